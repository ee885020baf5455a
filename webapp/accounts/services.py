"""What happens to people over several rows: who is let in, who is sent away, the links an administrator hands out."""

from datetime import datetime, timedelta

from allauth.account.forms import default_token_generator
from allauth.account.models import EmailAddress
from allauth.account.utils import user_pk_to_url_str
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.models import Session
from django.db import IntegrityError, transaction
from django.urls import reverse
from django.utils import timezone

from webapp.accounts.models import INVITATION_DAYS, Invitation, User, hash_token, new_token

INVITATION_SESSION_KEY = "invitation"


class SignupClosedError(Exception):
    """Somebody may not sign up: there is an administrator, and no invitation that still holds."""


def find_invitation(token: str, now: datetime | None = None) -> Invitation | None:
    """The invitation behind a link, if it still lets somebody in."""
    if not token:
        return None
    return Invitation.objects.open_at(now or timezone.now()).with_token(token).select_related("invited_by").first()


def may_sign_up(token: str) -> bool:
    return settings.OPEN_SIGNUP or not User.objects.exists() or find_invitation(token) is not None


def admit(user: User, token: str) -> User:
    """Save a new person: the first as administrator, later ones by invitation.

    Raises:
        SignupClosedError: neither first, nor invited, nor is sign-up open; or another took the place meanwhile.
        IntegrityError: the e-mail address has an account.
    """
    if not User.objects.exists() and _admit_founder(user):
        return user
    with transaction.atomic():
        invitation = find_invitation(token)
        if invitation is None and not settings.OPEN_SIGNUP:
            raise SignupClosedError
        user.save(force_insert=True)
        if invitation is not None and not _use(invitation, user) and not settings.OPEN_SIGNUP:
            raise SignupClosedError
    return user


def _admit_founder(user: User) -> bool:
    user.is_founder = user.is_staff = user.is_superuser = True
    try:
        with transaction.atomic():
            # SQLite's IMMEDIATE lets the second of two wait here and see the first; PostgreSQL's constraint stops it.
            if User.objects.exists():
                raise IntegrityError
            user.save(force_insert=True)
    except IntegrityError:
        user.is_founder = user.is_staff = user.is_superuser = False
        return False
    return True


def _use(invitation: Invitation, user: User) -> bool:
    """Spend an invitation. Of two who come with the same link, one is let in."""
    now = timezone.now()
    return bool(Invitation.objects.open_at(now).filter(pk=invitation.pk).update(used_at=now, used_by=user))


def invite(by: User, email: str = "") -> tuple[Invitation, str]:
    """Make an invitation; answers it and the token, which is kept nowhere."""
    token = new_token()
    now = timezone.now()
    invitation = Invitation.objects.create(
        token_hash=hash_token(token),
        email=email.strip().lower(),
        invited_by=by,
        created_at=now,
        expires_at=now + timedelta(days=INVITATION_DAYS),
    )
    return invitation, token


def revoke_invitation(invitation: Invitation) -> bool:
    return bool(
        Invitation.objects.filter(pk=invitation.pk, used_at=None, revoked_at=None).update(revoked_at=timezone.now())
    )


def restore_invitation(invitation: Invitation) -> bool:
    return bool(Invitation.objects.filter(pk=invitation.pk, used_at=None).update(revoked_at=None))


def reset_path(user: User) -> str:
    """Path of a link that sets a new password once: a login or a new password makes it void."""
    return reverse(
        "account_reset_password_from_key",
        kwargs={"uidb36": user_pk_to_url_str(user), "key": default_token_generator.make_token(user)},
    )


def deactivate(user: User) -> bool:
    """Keep somebody out, at once and everywhere; what they own stays."""
    changed = bool(User.objects.filter(pk=user.pk, is_active=True).update(is_active=False))
    if changed:
        end_sessions(user)
    return changed


def reactivate(user: User) -> bool:
    return bool(User.objects.filter(pk=user.pk, is_active=False).update(is_active=True))


def change_profile(user: User, *, name: str, email: str) -> None:
    """Name and e-mail, the latter also where allauth looks for it."""
    with transaction.atomic():
        User.objects.filter(pk=user.pk).update(name=name, email=email)
        if email != user.email:
            EmailAddress.objects.filter(user_id=user.pk).delete()
            EmailAddress.objects.create(user_id=user.pk, email=email, primary=True, verified=False)
    user.name, user.email = name, email


def end_sessions(user: User, *, but: str | None = None) -> int:
    """End every session of a person except the one whose key is given, and close its sockets.

    Sessions do not say whose they are, so each is opened: a rare wish on a small table.
    """
    from webapp import live  # late: the live module needs Channels and the jobs' models

    ended = 0
    for session in Session.objects.filter(expire_date__gt=timezone.now()).iterator():
        if session.session_key == but or session.get_decoded().get(SESSION_KEY) != str(user.pk):
            continue
        key = session.session_key  # deleting forgets it
        session.delete()
        live.session_ended(key)
        ended += 1
    return ended
