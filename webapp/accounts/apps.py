from typing import Any

from django.apps import AppConfig
from django.contrib.auth.signals import user_logged_out
from django.http import HttpRequest
from django.utils.translation import gettext_lazy as _


class AccountsConfig(AppConfig):
    name = "webapp.accounts"
    label = "accounts"
    verbose_name = _("people")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        from allauth.account.signals import password_changed, password_reset

        user_logged_out.connect(_close_sockets, dispatch_uid="accounts.close_sockets")
        password_changed.connect(_end_other_sessions, dispatch_uid="accounts.password_changed")
        password_reset.connect(_end_other_sessions, dispatch_uid="accounts.password_reset")


def _close_sockets(request: HttpRequest | None, **kwargs: Any) -> None:
    """The session is still there when Django tells of the logout: whatever was opened under it closes."""
    from webapp import live

    if request is not None and request.session.session_key:
        live.session_ended(request.session.session_key)


def _end_other_sessions(request: HttpRequest, user: Any, **kwargs: Any) -> None:
    """A new password sends away whoever knew the old one; Django's own check would leave their sockets open."""
    from webapp.accounts import services

    services.end_sessions(user, but=request.session.session_key)
