"""The socket: who is let in, what is replayed, in which order, and that it ends with the session."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from channels.db import database_sync_to_async
from django.conf import settings
from django.test import Client

from tests import factories
from webapp import live
from webapp.accounts.models import User
from webapp.asgi import application
from webapp.jobs import services
from webapp.jobs.models import Event, Job

pytestmark = [pytest.mark.django_db(transaction=True), pytest.mark.asyncio]


@pytest.fixture(autouse=True)
def _layer_in_memory(settings: Any) -> None:
    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}}


@database_sync_to_async
def person_and_session(email: str) -> tuple[User, str]:
    user = factories.make_user(email)
    client = Client()
    client.force_login(user)
    return user, client.cookies[settings.SESSION_COOKIE_NAME].value


@database_sync_to_async
def make_job(owner: User, events: int = 0) -> Job:
    job = services.create_job(owner, Job.Kind.INGEST, queue=Job.Queue.INGEST, title="Photos")
    Job.objects.filter(pk=job.pk).update(state=Job.State.RUNNING)
    for _event in range(events):
        services.record(job.pk, "photos")
    job.refresh_from_db()
    return job


record = sync_to_async(services.record)


class Socket(ApplicationCommunicator):
    """A browser's socket to the site; channels' own communicator asks for a web server that is not used here."""

    def __init__(self, session: str = "", origin: str = "http://testserver") -> None:
        headers = [(b"host", b"testserver"), (b"origin", origin.encode())]
        if session:
            headers.append((b"cookie", f"{settings.SESSION_COOKIE_NAME}={session}".encode()))
        scope = {"type": "websocket", "path": "/ws/", "query_string": b"", "headers": headers, "subprotocols": []}
        super().__init__(application, scope)

    async def connect(self) -> bool:
        await self.send_input({"type": "websocket.connect"})
        return bool((await self.receive_output(5))["type"] == "websocket.accept")

    async def disconnect(self) -> None:
        await self.send_input({"type": "websocket.disconnect", "code": 1000})
        await self.wait(5)


class Page:
    """A browser's end of an open socket."""

    def __init__(self, socket: Socket) -> None:
        self.socket = socket

    async def ask(self, **message: Any) -> None:
        await self.say(message)

    async def say(self, message: Any) -> None:
        await self.socket.send_input({"type": "websocket.receive", "text": json.dumps(message)})

    async def next(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads((await self.socket.receive_output(5))["text"])
        return message

    async def hear(self, key: str) -> dict[str, Any]:
        """The next message that has the key; others are passed over."""
        while True:
            message = await self.next()
            if key in message:
                return message

    async def numbers(self, count: int) -> list[int]:
        heard: list[int] = []
        while len(heard) < count:
            heard += [event["number"] for event in (await self.hear("events"))["events"]]
        return heard


@pytest.fixture
async def owner_page() -> AsyncIterator[tuple[User, Page]]:
    user, session = await person_and_session("owner@example.org")
    socket = Socket(session)
    assert await socket.connect()
    yield user, Page(socket)
    await socket.disconnect()


async def test_nobody_is_let_in_without_a_session() -> None:
    assert not await Socket().connect()
    assert not await Socket("no-such-session").connect()


@pytest.mark.parametrize("origin", ["https://evil.example", "null"])
async def test_a_foreign_origin_is_refused(origin: str) -> None:
    _user, session = await person_and_session("owner@example.org")
    assert not await Socket(session, origin).connect()


async def test_another_s_job_is_refused_like_one_that_does_not_exist(owner_page: tuple[User, Page]) -> None:
    _user, page = owner_page
    other, _session = await person_and_session("other@example.org")
    theirs = await make_job(other, events=2)
    for job_id in (str(theirs.pk), str(uuid4()), "nonsense"):
        await page.ask(subscribe={job_id: 0})
        assert (await page.hear("refused"))["refused"] == job_id
    await page.ask(refresh=[str(theirs.pk), "nonsense"])
    assert await page.hear("active") == {"active": [], "asked": []}
    await record(theirs.pk, "photos")
    assert await page.socket.receive_nothing(timeout=0.2)


@pytest.mark.parametrize("last", ["3", None, -1, 2**40, 1.5])
async def test_a_number_that_is_none_is_refused(last: Any, owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user)
    await page.ask(subscribe={str(job.pk): last})
    assert (await page.hear("refused"))["refused"] == str(job.pk)


async def test_who_comes_new_gets_everything_in_order(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user, events=7)
    await page.ask(subscribe={str(job.pk): 0})
    assert (await page.hear("subscribed"))["after"] == 0
    assert await page.numbers(7) == [1, 2, 3, 4, 5, 6, 7]


async def test_who_comes_back_gets_what_was_missed(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user, events=7)
    await page.ask(subscribe={str(job.pk): 5})
    assert (await page.hear("subscribed"))["after"] == 5
    assert await page.numbers(2) == [6, 7]


async def test_events_come_as_they_happen(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user, events=1)
    await page.ask(subscribe={str(job.pk): 1})
    await page.hear("subscribed")
    await record(job.pk, "photos", counts={"accepted": 3})
    message = await page.hear("events")
    assert message["job"] == str(job.pk)
    assert message["events"][0]["number"] == 2
    assert message["events"][0]["data"] == {"counts": {"accepted": 3}}


async def test_lost_hints_leave_no_gap(owner_page: tuple[User, Page], monkeypatch: pytest.MonkeyPatch) -> None:
    user, page = owner_page
    job = await make_job(user)
    await page.ask(subscribe={str(job.pk): 0})
    await page.hear("subscribed")
    with monkeypatch.context() as patch:
        patch.setattr(live, "publish", lambda event: None)
        for _event in range(3):
            await record(job.pk, "photos")
    await record(job.pk, "photos")
    assert await page.numbers(4) == [1, 2, 3, 4]


async def test_a_hint_that_comes_twice_or_late_is_told_once(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user, events=3)
    await page.ask(subscribe={str(job.pk): 0})
    assert await page.numbers(3) == [1, 2, 3]
    old = await database_sync_to_async(lambda: Event.objects.get(job=job, number=2))()
    await sync_to_async(live.publish)(old)
    await record(job.pk, "photos")
    assert await page.numbers(1) == [4]


async def test_a_job_left_is_heard_of_no_more(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    job = await make_job(user)
    await page.ask(subscribe={str(job.pk): 0})
    await page.hear("subscribed")
    await page.ask(unsubscribe=[str(job.pk)])
    await page.ask(refresh=[])
    await page.hear("active")
    await record(job.pk, "photos")
    assert "summary" in await page.next()
    assert await page.socket.receive_nothing(timeout=0.2)


async def test_a_refresh_says_how_jobs_stand(owner_page: tuple[User, Page]) -> None:
    user, page = owner_page
    active, ended = await make_job(user), await make_job(user)
    await database_sync_to_async(lambda: Job.objects.filter(pk=ended.pk).update(state=Job.State.FAILED, error="no"))()
    await page.ask(refresh=[str(ended.pk)])
    message = await page.hear("active")
    assert [summary["id"] for summary in message["active"]] == [str(active.pk)]
    assert [(summary["id"], summary["error"]) for summary in message["asked"]] == [(str(ended.pk), "no")]


async def test_the_socket_closes_with_its_session(owner_page: tuple[User, Page]) -> None:
    _user, page = owner_page
    session = (
        next(value for name, value in page.socket.scope["headers"] if name == b"cookie").decode().partition("=")[2]
    )
    await sync_to_async(live.session_ended)(session)
    closed = await asyncio.wait_for(page.socket.receive_output(5), 5)
    assert (closed["type"], closed["code"]) == ("websocket.close", 4401)


@pytest.mark.parametrize("message", [[], "text", {"subscribe": []}, {"unsubscribe": {}}, {"refresh": 3}, {}])
async def test_nonsense_is_passed_over(message: Any, owner_page: tuple[User, Page]) -> None:
    _user, page = owner_page
    await page.say(message)
    await page.ask(refresh=[])
    assert (await page.hear("active"))["active"] == []
