"""allauth asks here who may sign up, and where people go afterwards."""

from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from django.http import HttpRequest
from django.urls import reverse

from webapp.accounts import services
from webapp.accounts.models import User


class AccountAdapter(DefaultAccountAdapter):  # type: ignore[misc]
    def is_open_for_signup(self, request: HttpRequest) -> bool:
        return services.may_sign_up(request.session.get(services.INVITATION_SESSION_KEY, ""))

    def save_user(self, request: HttpRequest, user: User, form: Any, commit: bool = True) -> User:
        super().save_user(request, user, form, commit=False)
        user.name = form.cleaned_data.get("name", "")
        if commit:
            services.admit(user, request.session.get(services.INVITATION_SESSION_KEY, ""))
            request.session.pop(services.INVITATION_SESSION_KEY, None)
        return user

    def get_password_change_redirect_url(self, request: HttpRequest) -> str:
        return reverse("account")
