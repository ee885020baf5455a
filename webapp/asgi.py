"""The site's door: HTTP through the guard to Django, WebSockets to the one consumer."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "webapp.settings")

from django.core.asgi import get_asgi_application

http = get_asgi_application()

from channels.auth import AuthMiddlewareStack
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.urls import path

from webapp.consumers import LiveConsumer
from webapp.guard import BodyGuard

application = ProtocolTypeRouter(
    {
        "http": BodyGuard(http),
        "websocket": AllowedHostsOriginValidator(AuthMiddlewareStack(URLRouter([path("ws/", LiveConsumer.as_asgi())]))),
    }
)
