"""The site's door: a request changes threads once."""

from __future__ import annotations

from asgiref.sync import iscoroutinefunction

from webapp.asgi import http


def test_the_middleware_runs_in_one_thread() -> None:
    assert not iscoroutinefunction(http._middleware_chain)
