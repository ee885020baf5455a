"""Bodies are judged before they are read: Django would spool the whole of one before any view says no.

A body that is more than a form needs a session; one that is more than its address takes is refused by its announced
length, or cut off where it passes the limit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any

from channels.db import database_sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends.db import SessionStore

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

ANONYMOUS_BYTES = 64 * 1024
FILE_PATH = re.compile(r"^/imports/[0-9a-f-]+/(files|chunks)/\d+/$")
FORM_PATH = re.compile(r"^/labels/[0-9a-f-]+/examples/upload/$")


class TooLarge(Exception):
    """More bytes came than the address takes."""


class BodyGuard:
    """ASGI middleware over the HTTP application."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        announced = _length(headers)
        limit = _limit(scope["path"])
        if (announced is None or announced > ANONYMOUS_BYTES) and not await _has_session(headers):
            await _refuse(send, 401, "Log in first: your session has ended.")
            return
        if announced is not None and announced > limit:
            await _refuse(send, 413, f"This is {announced / 1e6:.0f} MB; at most {limit / 1e6:.0f} MB are taken here.")
            return
        try:
            await self.app(scope, _bounded(receive, limit), send)
        except TooLarge:
            await _refuse(send, 413, f"At most {limit / 1e6:.0f} MB are taken here.")


def _limit(path: str) -> int:
    """The most bytes of body that an address takes."""
    found = FILE_PATH.match(path)
    if not found:
        return settings.MAX_FORM_BYTES if FORM_PATH.match(path) else settings.DATA_UPLOAD_MAX_MEMORY_SIZE
    return settings.MAX_PHOTO_BYTES if found[1] == "files" else settings.ZIP_CHUNK_BYTES


def _length(headers: dict[bytes, bytes]) -> int | None:
    """Content-Length; None for a body of unknown length, 0 where no body is announced at all."""
    if b"content-length" in headers:
        value = headers[b"content-length"]
        return int(value) if value.isdigit() else None
    return None if b"transfer-encoding" in headers else 0


def _bounded(receive: Receive, limit: int) -> Receive:
    total = 0

    async def bounded() -> dict[str, Any]:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise TooLarge
        return message

    return bounded


async def _has_session(headers: dict[bytes, bytes]) -> bool:
    try:
        cookie = SimpleCookie(headers.get(b"cookie", b"").decode("latin-1")).get(settings.SESSION_COOKIE_NAME)
    except CookieError:
        return False
    if cookie is None:
        return False
    stored = await database_sync_to_async(SessionStore(cookie.value).load)()
    return SESSION_KEY in stored


async def _refuse(send: Send, status: int, sentence: str) -> None:
    body = json.dumps({"error": sentence}).encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"application/json"), (b"connection", b"close")],
        }
    )
    await send({"type": "http.response.body", "body": body})
