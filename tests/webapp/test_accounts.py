"""Who gets in, by which door, and who is sent away."""

from datetime import timedelta
from uuid import uuid4

import pytest
from allauth.account.models import EmailAddress
from django.contrib.auth.signals import user_login_failed
from django.contrib.sessions.models import Session
from django.core import mail
from django.core.cache import cache
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from webapp import live
from webapp.accounts import services
from webapp.accounts.models import Invitation, User, hash_token

PASSWORD = "a heron by the weir"
SCRIPT = "<script>alert('name')</script>"

pytestmark = pytest.mark.django_db


@pytest.fixture(autouse=True)
def _plain_parts(settings, tmp_path):
    settings.STATIC_ROOT = tmp_path
    settings.CACHES = {"default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"}}
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}
    settings.STORAGES = {
        **settings.STORAGES,
        "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
    }
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    cache.clear()


@pytest.fixture
def administrator():
    return User.objects.create_superuser("ada@example.org", PASSWORD, name="Ada", is_founder=True)


@pytest.fixture
def member():
    return User.objects.create_user("grace@example.org", PASSWORD, name="Grace")


@pytest.fixture
def closed_sockets(monkeypatch):
    keys = []
    monkeypatch.setattr(live, "session_ended", keys.append)
    return keys


def client_of(user):
    client = Client()
    client.force_login(user)
    return client


def sign_up(client, email, *, password=PASSWORD, name="", **extra):
    return client.post(reverse("account_signup"), {"email": email, "password1": password, "name": name, **extra})


def invite(administrator, email=""):
    return services.invite(administrator, email)


def accept(token, email, *, client=None):
    client = client or Client()
    client.get(reverse("invitation", args=[token]))
    return sign_up(client, email)


# The first account ------------------------------------------------------------------------------


def test_first_account_is_the_administrator():
    response = sign_up(Client(), "Ada@Example.org", name="Ada")

    assert response.status_code == 302
    user = User.objects.get()
    assert (user.email, user.name) == ("ada@example.org", "Ada")
    assert user.is_founder
    assert user.is_staff
    assert user.is_superuser


def test_signup_page_says_who_the_first_account_is():
    assert "first account is the administrator" in Client().get(reverse("account_signup")).text


def test_second_account_needs_an_invitation(administrator):
    page = Client().get(reverse("account_signup"))
    response = sign_up(Client(), "eve@example.org")

    assert "Sign-up is by invitation" in page.text
    assert "Sign-up is by invitation" in response.text
    assert User.objects.count() == 1


def test_of_two_first_signups_at_once_one_is_administrator(administrator, monkeypatch):
    """The second saw an empty table before the first had committed: the constraint decides."""
    monkeypatch.setattr(type(User.objects), "exists", lambda self: False)

    with pytest.raises(services.SignupClosedError):
        services.admit(User(email="eve@example.org"), "")

    assert list(User.objects.filter(is_staff=True)) == [administrator]
    assert User.objects.count() == 1


def test_loser_of_that_race_is_told_kindly(administrator, monkeypatch):
    monkeypatch.setattr(type(User.objects), "exists", lambda self: False)

    response = sign_up(Client(), "eve@example.org")

    assert response.status_code == 200
    assert "Sign-up is by invitation" in response.text


def test_second_founder_is_refused_by_the_database(administrator):
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.create_user("eve@example.org", PASSWORD, is_founder=True)


def test_open_signup_lets_anybody_in_as_member(administrator, settings):
    settings.OPEN_SIGNUP = True

    sign_up(Client(), "lin@example.org")

    assert not User.objects.get(email="lin@example.org").is_staff


def test_address_is_taken_whatever_its_case(administrator, settings):
    settings.OPEN_SIGNUP = True

    response = sign_up(Client(), "ADA@example.org")

    assert response.status_code == 200
    assert User.objects.count() == 1
    with pytest.raises(IntegrityError), transaction.atomic():
        User.objects.bulk_create([User(email="ADA@EXAMPLE.ORG")])


@pytest.mark.parametrize("password", ["short", "password123", "ada@example.org"])
def test_weak_password_is_refused(password):
    response = sign_up(Client(), "ada@example.org", password=password)

    assert 'aria-invalid="true"' in response.text
    assert not User.objects.exists()


# Invitations ------------------------------------------------------------------------------------


def test_invitation_lets_one_person_in(administrator):
    invitation, token = invite(administrator)

    accept(token, "grace@example.org")

    user = User.objects.get(email="grace@example.org")
    invitation.refresh_from_db()
    assert (user.is_staff, user.is_founder) == (False, False)
    assert invitation.used_by == user
    assert EmailAddress.objects.get(user=user).primary


def test_invitation_works_once(administrator):
    _, token = invite(administrator)
    late = Client()
    late.get(reverse("invitation", args=[token]))
    accept(token, "grace@example.org")

    response = sign_up(late, "eve@example.org")

    assert "Sign-up is by invitation" in response.text
    assert Client().get(reverse("invitation", args=[token])).status_code == 410
    assert not User.objects.filter(email="eve@example.org").exists()


def test_of_two_with_one_invitation_at_once_one_gets_in(administrator, monkeypatch):
    """Both found the invitation open; the update that spends it finds it spent."""
    invitation, token = invite(administrator)
    accept(token, "grace@example.org")
    monkeypatch.setattr(services, "find_invitation", lambda *args: invitation)

    with pytest.raises(services.SignupClosedError):
        services.admit(User(email="eve@example.org"), token)

    assert not User.objects.filter(email="eve@example.org").exists()


@pytest.mark.parametrize("change", [{"expires_at": timezone.now() - timedelta(1)}, {"revoked_at": timezone.now()}])
def test_expired_or_revoked_invitation_lets_nobody_in(administrator, change):
    invitation, token = invite(administrator)
    Invitation.objects.filter(pk=invitation.pk).update(**change)

    assert Client().get(reverse("invitation", args=[token])).status_code == 410
    accept(token, "eve@example.org")
    assert User.objects.count() == 1


def test_invitation_revoked_after_it_was_opened(administrator):
    invitation, token = invite(administrator)
    client = Client()
    client.get(reverse("invitation", args=[token]))
    services.revoke_invitation(invitation)

    sign_up(client, "eve@example.org")

    assert User.objects.count() == 1


def test_made_up_invitation_is_closed():
    assert Client().get(reverse("invitation", args=["made-up"])).status_code == 410


def test_invitation_for_an_address_admits_that_address_alone(administrator):
    _, token = invite(administrator, "Grace@example.org")
    client = Client()
    client.get(reverse("invitation", args=[token]))

    assert "This invitation is for grace@example.org" in sign_up(client, "eve@example.org").text
    sign_up(client, "grace@example.org")
    assert User.objects.filter(email="grace@example.org").exists()


def test_database_keeps_no_token(administrator):
    invitation, token = invite(administrator)

    assert invitation.token_hash == hash_token(token)
    assert token not in str(Invitation.objects.values_list().get())


# Logging in and out -----------------------------------------------------------------------------


def log_in(client, email="grace@example.org", password=PASSWORD, query="", **headers):
    return client.post(reverse("account_login") + query, {"login": email, "password": password}, headers=headers)


def test_member_logs_in_by_email_whatever_its_case(member):
    assert log_in(Client(), "GRACE@example.org").url == "/"


def test_wrong_password_and_unknown_address_read_the_same(member):
    wrong = log_in(Client(), password="wrong").text
    unknown = log_in(Client(), email="nobody@example.org").text

    assert "not correct" in wrong
    assert "not correct" in unknown


def test_deactivated_member_stays_out(member):
    services.deactivate(member)
    client = Client()

    log_in(client)

    assert client.get(reverse("account")).status_code == 302


@pytest.mark.parametrize(
    "target",
    ["https://evil.example/", "//evil.example/", "/\\evil.example", "javascript:alert(1)", "http:evil.example"],
)
def test_next_never_leaves_the_site(member, administrator, settings, target):
    settings.OPEN_SIGNUP = True
    response = log_in(Client(), query=f"?next={target}")
    signed_up = sign_up(Client(), "lin@example.org", next=target)

    assert (response.status_code, response.url) == (302, "/")
    assert (signed_up.status_code, signed_up.url) == (302, "/")


def test_next_within_the_site_is_followed(member):
    assert log_in(Client(), query="?next=/account/").url == "/account/"


def test_bad_logins_are_stopped_whatever_address_they_claim(member):
    failed = []
    receiver = lambda sender, **kwargs: failed.append(1)  # noqa: E731
    user_login_failed.connect(receiver)
    client = Client()
    codes = [
        log_in(client, f"{n}@example.org", "guess", **{"X-Forwarded-For": f"10.0.0.{n}"}).status_code for n in range(20)
    ]
    user_login_failed.disconnect(receiver)

    assert len(failed) <= 10
    assert codes[-1] == 429


def test_one_account_is_guarded_across_addresses(member):
    codes = [log_in(Client(REMOTE_ADDR=f"10.0.1.{n}"), password="guess").status_code for n in range(7)]

    assert codes[-1] == 429


def test_logging_out_closes_sockets(member, closed_sockets):
    client = client_of(member)
    key = client.session.session_key

    client.post(reverse("account_logout"))

    assert closed_sockets == [key]
    assert client.get(reverse("account")).status_code == 302


def test_logging_out_takes_a_post(member):
    client = client_of(member)
    client.get(reverse("account_logout"))

    assert client.get(reverse("account")).status_code == 200


def test_log_out_everywhere_ends_all_sessions_of_one_person(member, administrator, closed_sockets):
    here, there, other = client_of(member), client_of(member), client_of(administrator)
    keys = {here.session.session_key, there.session.session_key}

    here.post(reverse("log_out_everywhere"))

    assert set(closed_sockets) == keys
    assert there.get(reverse("account")).status_code == 302
    assert other.get(reverse("account")).status_code == 200


# Passwords --------------------------------------------------------------------------------------


def test_changing_the_password_ends_other_sessions(member, closed_sockets):
    here, there = client_of(member), client_of(member)
    old_keys = {here.session.session_key, there.session.session_key}
    new = "an otter in the reeds"

    response = here.post(
        reverse("account_change_password"), {"oldpassword": PASSWORD, "password1": new, "password2": new}
    )

    assert response.url == reverse("account")
    assert here.get(reverse("account")).status_code == 200
    assert there.get(reverse("account")).status_code == 302
    assert set(closed_sockets) == old_keys
    member.refresh_from_db()
    assert member.check_password(new)


def test_without_mail_the_reset_page_names_the_administrator(member, settings):
    settings.EMAIL_CONFIGURED = False

    for response in (
        Client().get(reverse("account_reset_password")),
        Client().post(reverse("account_reset_password"), {"email": member.email}),
    ):
        assert "This studio sends no mail" in response.text
    assert mail.outbox == []


def test_with_mail_the_link_is_sent_and_unknown_addresses_look_the_same(member, settings):
    settings.EMAIL_CONFIGURED = True

    known = Client().post(reverse("account_reset_password"), {"email": member.email})
    unknown = Client().post(reverse("account_reset_password"), {"email": "nobody@example.org"})

    assert known.url == unknown.url == reverse("account_reset_password_done")
    assert mail.outbox[0].to == [member.email]
    assert "/accounts/password/reset/key/" in mail.outbox[0].body


def test_reset_link_works_once_and_ends_sessions(member, closed_sockets):
    elsewhere = client_of(member)
    member.refresh_from_db()  # a login makes older links void
    link = services.reset_path(member)
    new = "an otter in the reeds"
    client = Client()
    form = client.get(link).url

    client.post(form, {"password1": new, "password2": new})

    member.refresh_from_db()
    assert member.check_password(new)
    assert elsewhere.get(reverse("account")).status_code == 302
    assert "This link no longer works" in Client().get(link).text


def test_reset_link_is_void_after_a_login(member):
    link = services.reset_path(member)
    log_in(Client())

    assert "This link no longer works" in Client().get(link).text


# One's own account ------------------------------------------------------------------------------


def test_account_needs_a_login():
    assert Client().get(reverse("account")).status_code == 302


def test_name_changes_without_the_password(member):
    client_of(member).post(reverse("account"), {"name": "Grace H.", "email": member.email})

    member.refresh_from_db()
    assert member.name == "Grace H."


def test_email_changes_only_with_the_password(member):
    client = client_of(member)
    refused = client.post(reverse("account"), {"name": "", "email": "new@example.org"})
    client.post(reverse("account"), {"name": "", "email": "New@example.org", "password": PASSWORD})

    assert "type your current password" in refused.text
    member.refresh_from_db()
    assert member.email == "new@example.org"
    assert log_in(Client(), "new@example.org").status_code == 302
    assert log_in(Client(), "grace@example.org").status_code == 200


def test_email_of_another_is_refused(member, administrator):
    response = client_of(member).post(
        reverse("account"), {"name": "", "email": administrator.email, "password": PASSWORD}
    )

    assert "Another account has this address" in response.text


# People: the administrator's page ---------------------------------------------------------------


def people_doors(person, invitation):
    return [
        ("get", reverse("people")),
        ("post", reverse("invite")),
        ("post", reverse("revoke_invitation", args=[invitation.pk])),
        ("post", reverse("restore_invitation", args=[invitation.pk])),
        ("post", reverse("make_reset_link", args=[person.pk])),
        ("post", reverse("deactivate", args=[person.pk])),
        ("post", reverse("reactivate", args=[person.pk])),
    ]


def test_people_is_not_there_for_members(administrator, member):
    invitation, _ = invite(administrator)
    client = client_of(member)

    for method, url in people_doors(administrator, invitation):
        assert getattr(client, method)(url).status_code == 404, url
    administrator.refresh_from_db()
    invitation.refresh_from_db()
    assert administrator.is_active
    assert invitation.revoked_at is None


def test_people_sends_outsiders_to_the_login(administrator, member):
    invitation, _ = invite(administrator)

    for method, url in people_doors(member, invitation):
        response = getattr(Client(), method)(url)
        assert response.status_code == 302
        assert response.url.startswith(reverse("account_login")), url
    member.refresh_from_db()
    assert member.is_active


def test_people_takes_posts_for_changes(administrator, member):
    invitation, _ = invite(administrator)
    client = client_of(administrator)

    for method, url in people_doors(member, invitation):
        if method == "post":
            assert client.get(url).status_code == 405, url


def test_people_needs_csrf(administrator, member):
    invitation, _ = invite(administrator)
    client = Client(enforce_csrf_checks=True)
    client.force_login(administrator)

    for method, url in people_doors(member, invitation):
        if method == "post":
            response = client.post(url)
            assert response.status_code == 403, url
            assert "The page was too old" in response.text


@pytest.mark.parametrize("name", ["account_login", "account_signup", "account_logout", "account", "log_out_everywhere"])
def test_forms_need_csrf(member, name):
    client = Client(enforce_csrf_checks=True)
    if name not in ("account_login", "account_signup"):
        client.force_login(member)

    assert client.post(reverse(name), {"name": "x", "email": member.email}).status_code == 403


def test_invitation_link_is_shown_once(administrator):
    client = client_of(administrator)
    first = client.post(reverse("invite"), {"email": ""}, follow=True).text
    second = client.get(reverse("people")).text

    assert "http://testserver/invitations/" in first
    assert "/invitations/" not in second.replace("/people/invitations/", "")


def test_inviting_somebody_who_is_here_is_refused(administrator, member):
    response = client_of(administrator).post(reverse("invite"), {"email": "GRACE@example.org"}, follow=True)

    assert "has an account already" in response.text
    assert not Invitation.objects.exists()


def test_revoking_an_invitation_can_be_undone(administrator):
    invitation, token = invite(administrator)
    client = client_of(administrator)

    page = client.post(reverse("revoke_invitation", args=[invitation.pk]), follow=True).text
    undo = reverse("restore_invitation", args=[invitation.pk])
    assert f'action="{undo}"' in page
    assert Client().get(reverse("invitation", args=[token])).status_code == 410
    client.post(undo)
    assert Client().get(reverse("invitation", args=[token])).status_code == 302


def test_deactivating_ends_sessions_and_can_be_undone(administrator, member, closed_sockets):
    theirs, client = client_of(member), client_of(administrator)

    page = client.post(reverse("deactivate", args=[member.pk]), follow=True).text
    undo = reverse("reactivate", args=[member.pk])
    assert f'action="{undo}"' in page
    assert len(closed_sockets) == 1
    assert theirs.get(reverse("account")).status_code == 302
    assert Session.objects.count() == 1
    client.post(undo)
    assert log_in(Client()).status_code == 302


def test_administrators_do_not_lock_themselves_out(administrator):
    client_of(administrator).post(reverse("deactivate", args=[administrator.pk]))

    administrator.refresh_from_db()
    assert administrator.is_active


def test_administrator_makes_a_reset_link(administrator, member):
    page = client_of(administrator).post(reverse("make_reset_link", args=[member.pk]), follow=True)
    link = page.context["fresh_link"]["url"]

    assert link in page.text
    assert Client().get(link).status_code == 302


def test_unknown_ids_are_not_there(administrator):
    client = client_of(administrator)

    for name in ("make_reset_link", "deactivate", "reactivate", "revoke_invitation", "restore_invitation"):
        assert client.post(reverse(name, args=[uuid4()])).status_code == 404


def test_number_of_queries_does_not_grow_with_people(administrator, django_assert_max_num_queries):
    client = client_of(administrator)

    def add(start, stop):
        for n in range(start, stop):
            _, token = invite(administrator)
            services.admit(User(email=f"{n}@example.org", name=f"N{n}"), token)
            invite(administrator, f"open{n}@example.org")

    add(0, 2)
    with django_assert_max_num_queries(9):
        client.get(reverse("people"))
    add(2, 30)
    with django_assert_max_num_queries(9):
        client.get(reverse("people"))


def test_script_in_names_stays_text(administrator):
    User.objects.filter(pk=administrator.pk).update(name=SCRIPT)
    User.objects.create_user("eve@example.org", PASSWORD, name=SCRIPT)
    _, token = invite(administrator)
    client = client_of(administrator)
    invited = Client()
    invited.get(reverse("invitation", args=[token]))

    for page in (
        client.get(reverse("people")),
        client.get(reverse("account")),
        client.post(reverse("deactivate", args=[User.objects.get(email="eve@example.org").pk]), follow=True),
        invited.get(reverse("account_signup")),
    ):
        assert "&lt;script&gt;" in page.text
        assert SCRIPT not in page.text


def test_admin_login_is_the_sites_own(member):
    assert Client().get("/admin/login/").url.startswith(reverse("account_login"))
    assert client_of(member).get("/admin/", follow=True).status_code == 403
