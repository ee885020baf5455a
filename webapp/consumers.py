"""The one socket of a page: authorise, join, replay what was missed, forward."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from channels.db import database_sync_to_async
from channels.generic.websocket import AsyncJsonWebsocketConsumer

from webapp import live
from webapp.jobs.models import Event, Job

MAX_JOBS = 50
REPLAY = 500  # events a message
LOGGED_OUT = 4401


class LiveConsumer(AsyncJsonWebsocketConsumer):  # type: ignore[misc]
    """Speaks JSON. The browser sends `{"subscribe": {job id: last number seen}}`, `{"unsubscribe": [job id]}` or
    `{"refresh": [job id]}`, which asks how the active jobs and the named ones stand.

    It gets `{"subscribed": id, "after": number}` and from there `{"job": id, "events": [{"number", "type", "data",
    "at"}, …]}` in order, with all that are kept, `{"summary": {…}}` whenever a job of its user changes,
    `{"active": [summary], "asked": [summary]}` for a refresh, and `{"refused": id}` for a job that is not theirs.
    """

    async def connect(self) -> None:
        self.seen: dict[str, int] = {}
        user, session = self.scope["user"], self.scope["session"]
        if not user.is_authenticated:
            await self.close(LOGGED_OUT)
            return
        self.own_groups = [live.user_group(user.pk), live.session_group(session.session_key)]
        for group in self.own_groups:
            await self.channel_layer.group_add(group, self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:
        for group in [*getattr(self, "own_groups", []), *(live.job_group(job) for job in self.seen)]:
            await self.channel_layer.group_discard(group, self.channel_name)

    async def receive_json(self, content: Any, **kwargs: Any) -> None:
        if not isinstance(content, dict):
            return
        wanted = content.get("subscribe")
        if isinstance(wanted, dict):
            for job_id, last in list(wanted.items())[:MAX_JOBS]:
                await self._subscribe(str(job_id), last)
        gone = content.get("unsubscribe")
        if isinstance(gone, list):
            for job_id in gone[:MAX_JOBS]:
                if self.seen.pop(str(job_id), None) is not None:
                    await self.channel_layer.group_discard(live.job_group(job_id), self.channel_name)
        asked = content.get("refresh")
        if isinstance(asked, list):
            await self.send_json(await _standing(self.scope["user"].pk, [str(job_id) for job_id in asked[:MAX_JOBS]]))

    async def _subscribe(self, job_id: str, last: Any) -> None:
        is_new = job_id not in self.seen
        if (
            not isinstance(last, int)
            or not 0 <= last < 2**31
            or (is_new and len(self.seen) >= MAX_JOBS)
            or not await _owns(self.scope["user"].pk, job_id)
        ):
            await self.send_json({"refused": job_id})
            return
        self.seen[job_id] = last
        if is_new:  # join first, then replay: what happens in between comes twice and is told by its number
            await self.channel_layer.group_add(live.job_group(job_id), self.channel_name)
        await self.send_json({"subscribed": job_id, "after": self.seen[job_id]})
        await self._replay(job_id)

    async def _replay(self, job_id: str) -> None:
        while events := await _events_after(job_id, self.seen[job_id]):
            self.seen[job_id] = events[-1]["number"]
            await self.send_json({"job": job_id, "events": events})

    async def job_event(self, message: dict[str, Any]) -> None:
        """A hint: forwarded when it is the next number, else the rows tell what lies between."""
        job_id, event = message["job"], message["event"]
        last = self.seen.get(job_id)
        if last is None or event["number"] <= last:
            return
        if event["number"] == last + 1:
            self.seen[job_id] = event["number"]
            await self.send_json({"job": job_id, "events": [event]})
        else:
            await self._replay(job_id)

    async def job_summary(self, message: dict[str, Any]) -> None:
        await self.send_json({"summary": message["summary"]})

    async def session_ended(self, message: dict[str, Any]) -> None:
        await self.close(LOGGED_OUT)


@database_sync_to_async  # type: ignore[untyped-decorator]
def _owns(user_id: Any, job_id: str) -> bool:
    pk = _uuid(job_id)
    return pk is not None and Job.objects.filter(pk=pk, owner_id=user_id).exists()


@database_sync_to_async  # type: ignore[untyped-decorator]
def _standing(user_id: Any, job_ids: list[str]) -> dict[str, Any]:
    own = Job.objects.filter(owner_id=user_id)
    asked = own.filter(pk__in=[pk for pk in map(_uuid, job_ids) if pk is not None]).exclude(state__in=Job.ACTIVE)
    return {
        "active": [job.summary() for job in own.active().order_by("created")[:MAX_JOBS]],
        "asked": [job.summary() for job in asked],
    }


def _uuid(text: str) -> UUID | None:
    """The id in the one spelling that groups are named by."""
    try:
        pk = UUID(text)
    except ValueError:
        return None
    return pk if str(pk) == text else None


@database_sync_to_async  # type: ignore[untyped-decorator]
def _events_after(job_id: str, last: int) -> list[dict[str, Any]]:
    rows = Event.objects.filter(job_id=job_id, number__gt=last).order_by("number")[:REPLAY]
    return [live.as_message(event) for event in rows]
