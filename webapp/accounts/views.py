"""Doors for people: sign-up by invitation, one's own account, and the administrator's list of everybody."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from http import HTTPStatus
from typing import Any
from uuid import UUID

from allauth.account import views as allauth_views
from django.conf import settings
from django.contrib import messages
from django.contrib.auth import logout
from django.contrib.auth.decorators import login_not_required
from django.db import IntegrityError
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase
from django.shortcuts import get_object_or_404, redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.decorators import method_decorator
from django.utils.translation import gettext as _
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.decorators.http import require_GET, require_POST, require_safe

from webapp import live
from webapp.accounts import services
from webapp.accounts.forms import InvitationForm, ProfileForm, SignupForm
from webapp.accounts.models import Invitation, User

FRESH_LINK = "fresh_link"

View = Callable[..., HttpResponse]


def administrator_only(view: View) -> View:
    """To everybody else the page is not there."""

    @functools.wraps(view)
    def guarded(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if not request.user.is_staff:
            raise Http404
        return view(request, *args, **kwargs)

    return guarded


# Coming in --------------------------------------------------------------------------------------


class LoginView(allauth_views.LoginView):  # type: ignore[misc]
    def get_form(self, form_class: Any = None) -> Any:
        return _plain(super().get_form(form_class))

    def form_invalid(self, form: Any) -> HttpResponse:
        response: HttpResponse = super().form_invalid(form)
        if form.has_error("__all__", "too_many_login_attempts"):
            response.status_code = HTTPStatus.TOO_MANY_REQUESTS
        return response

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        return {
            **super().get_context_data(**kwargs),
            "may_sign_up": services.may_sign_up(_invitation_token(self.request)),
        }


class SignupView(allauth_views.SignupView):  # type: ignore[misc]
    form_class = SignupForm
    template_name_signup_closed = "account/signup_closed.html"

    def get_form_kwargs(self) -> dict[str, Any]:
        invitation = services.find_invitation(_invitation_token(self.request))
        kwargs: dict[str, Any] = super().get_form_kwargs()
        if invitation is not None and invitation.email:
            kwargs["initial"] = {**kwargs["initial"], "email": invitation.email}
        return {**kwargs, "invitation": invitation}

    def form_valid(self, form: SignupForm) -> HttpResponse:
        try:
            response: HttpResponse = super().form_valid(form)
        except services.SignupClosedError:
            closed: HttpResponse = self.closed()
            return closed
        except IntegrityError:  # the same address, twice at the same moment
            form.add_error("email", _("This address has an account already. Log in instead."))
            invalid: HttpResponse = self.form_invalid(form)
            return invalid
        return response

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        context: dict[str, Any] = super().get_context_data(**kwargs)
        return {**context, "invitation": context["form"].invitation, "is_first": not User.objects.exists()}


@method_decorator(login_not_required, name="dispatch")
class PasswordResetView(allauth_views.PasswordResetView):  # type: ignore[misc]
    """Without mail settings there is nothing to send: the page says who can help instead."""

    def dispatch(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if not settings.EMAIL_CONFIGURED:
            return render(request, "account/password_reset_unavailable.html")
        response: HttpResponseBase = super().dispatch(request, *args, **kwargs)
        return response

    def get_form(self, form_class: Any = None) -> Any:
        return _plain(super().get_form(form_class))


class PasswordResetFromKeyView(allauth_views.PasswordResetFromKeyView):  # type: ignore[misc]
    def get_form(self, form_class: Any = None) -> Any:
        return _plain(super().get_form(form_class))


class PasswordChangeView(allauth_views.PasswordChangeView):  # type: ignore[misc]
    def get_form(self, form_class: Any = None) -> Any:
        return _plain(super().get_form(form_class))

    def form_valid(self, form: Any) -> HttpResponse:
        before = self.request.session.session_key
        response: HttpResponse = super().form_valid(form)
        if before:  # the session has a new key: sockets opened under the old one would outlive the next logout
            live.session_ended(before)
        return response


@login_not_required
@never_cache
@require_safe
def invitation(request: HttpRequest, token: str) -> HttpResponse:
    if request.user.is_authenticated:
        messages.info(request, _("You have an account: an invitation is for somebody without one."))
        return redirect("home")
    found = services.find_invitation(token)
    if found is None:
        return render(request, "account/invitation_closed.html", status=HTTPStatus.GONE)
    request.session[services.INVITATION_SESSION_KEY] = token
    return redirect("account_signup")


# One's own account ------------------------------------------------------------------------------


@sensitive_post_parameters("password")
def account(request: HttpRequest) -> HttpResponse:
    user = _user(request)
    form = ProfileForm(request.POST or None, user=user)
    if request.method == "POST" and form.is_valid():
        services.change_profile(user, name=form.cleaned_data["name"], email=form.cleaned_data["email"])
        messages.success(request, _("Saved."))
        return redirect("account")
    return render(request, "account/account.html", {"form": form})


@require_POST
def log_out_everywhere(request: HttpRequest) -> HttpResponse:
    services.end_sessions(_user(request), but=request.session.session_key)
    logout(request)
    messages.success(request, _("You are logged out everywhere."))
    return redirect("account_login")


# Everybody: the administrator's page ------------------------------------------------------------


@administrator_only
@never_cache
@require_GET
def people(request: HttpRequest) -> HttpResponse:
    now = timezone.now()
    invitations = Invitation.objects.filter(used_at=None, revoked_at=None).select_related("invited_by")
    return render(
        request,
        "people/people.html",
        {
            "people": User.objects.select_related("invitation_used__invited_by").order_by("date_joined"),
            "invitations": invitations,
            "now": now,
            "form": InvitationForm(),
            "fresh_link": request.session.pop(FRESH_LINK, None),
        },
    )


@administrator_only
@require_POST
def invite(request: HttpRequest) -> HttpResponse:
    form = InvitationForm(request.POST)
    if not form.is_valid():
        messages.error(request, " ".join(str(error) for error in form.errors["email"]))
        return redirect("people")
    made, token = services.invite(_user(request), form.cleaned_data["email"])
    _show_once(request, "invitation", made.email, reverse("invitation", args=[token]))
    return redirect("people")


@administrator_only
@require_POST
def revoke_invitation(request: HttpRequest, invitation_id: UUID) -> HttpResponse:
    found = get_object_or_404(Invitation, pk=invitation_id)
    if services.revoke_invitation(found):
        _done(request, _("The invitation is revoked."), undo=reverse("restore_invitation", args=[found.pk]))
    return redirect("people")


@administrator_only
@require_POST
def restore_invitation(request: HttpRequest, invitation_id: UUID) -> HttpResponse:
    if services.restore_invitation(get_object_or_404(Invitation, pk=invitation_id)):
        messages.success(request, _("The invitation holds again."))
    return redirect("people")


@administrator_only
@require_POST
def make_reset_link(request: HttpRequest, user_id: UUID) -> HttpResponse:
    person = get_object_or_404(User, pk=user_id, is_active=True)
    _show_once(request, "reset", person.display_name, services.reset_path(person))
    return redirect("people")


@administrator_only
@require_POST
def deactivate(request: HttpRequest, user_id: UUID) -> HttpResponse:
    person = get_object_or_404(User, pk=user_id)
    if person.pk == request.user.pk:
        messages.error(request, _("You cannot deactivate your own account: nobody could let you in again."))
    elif services.deactivate(person):
        words = _("%(name)s can no longer log in.") % {"name": person.display_name}
        _done(request, words, undo=reverse("reactivate", args=[person.pk]))
    return redirect("people")


@administrator_only
@require_POST
def reactivate(request: HttpRequest, user_id: UUID) -> HttpResponse:
    person = get_object_or_404(User, pk=user_id)
    if services.reactivate(person):
        messages.success(request, _("%(name)s can log in again.") % {"name": person.display_name})
    return redirect("people")


# The components, shown together -----------------------------------------------------------------


@login_not_required
@require_safe
def styleguide(request: HttpRequest) -> HttpResponse:
    if not (settings.DEBUG or request.user.is_staff):
        raise Http404
    sprite = (settings.BASE_DIR / "static/img/icons.svg").read_text()
    icons = re.findall(r'<symbol id="([^"]+)"', sprite)
    return render(request, "styleguide.html", {"tones": range(1, 9), "icons": icons})


def _user(request: HttpRequest) -> User:
    assert isinstance(request.user, User)  # the login middleware has seen to it
    return request.user


def _invitation_token(request: HttpRequest) -> str:
    token: str = request.session.get(services.INVITATION_SESSION_KEY, "")
    return token


def _plain(form: Any) -> Any:
    """allauth repeats each label as a placeholder; the label is enough."""
    for field in form.fields.values():
        field.widget.attrs.pop("placeholder", None)
    for name in ("login", "email"):
        if name in form.fields:
            form.fields[name].label = _("E-mail")
    if "oldpassword" in form.fields:
        form.fields["oldpassword"].label = _("Current password")
    for name in ("password", "oldpassword"):
        if name in form.fields:
            form.fields[name].help_text = ""  # a link to the reset page, which stands below the form
    return form


def _show_once(request: HttpRequest, kind: str, whom: str, path: str) -> None:
    """Keep a link for the next page view only: the database has nothing that it could be made from again."""
    request.session[FRESH_LINK] = {"kind": kind, "whom": whom, "url": request.build_absolute_uri(path)}


def _done(request: HttpRequest, words: str, *, undo: str) -> None:
    """A toast with a way back, in place of a question beforehand."""
    messages.success(request, words, extra_tags=f"undo={undo}")
