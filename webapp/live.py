"""What browsers hear of: an event is stored first, and its hint goes out when the transaction has committed."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.db import transaction

from webapp.jobs.models import Event, Job

log = logging.getLogger(__name__)


def job_group(job_id: object) -> str:
    return f"job.{job_id}"


def user_group(user_id: object) -> str:
    return f"user.{user_id}"


def session_group(session_key: str) -> str:
    return f"session.{hashlib.sha256(session_key.encode()).hexdigest()[:32]}"


def publish(event: Event) -> None:
    """Tell whoever watches the event's job of it, once the transaction has committed."""
    message = {"type": "job.event", "job": str(event.job_id), "event": as_message(event)}
    transaction.on_commit(lambda: _send(job_group(event.job_id), message))


def publish_summary(job: Job) -> None:
    """Tell the owner's pages how the job stands: the pill in the header, the lists of jobs."""
    transaction.on_commit(lambda: _send(user_group(job.owner_id), {"type": "job.summary", "summary": job.summary()}))


def session_ended(session_key: str) -> None:
    """Close the sockets that were opened under a session that is no more."""
    transaction.on_commit(lambda: _send(session_group(session_key), {"type": "session.ended"}))


def as_message(event: Event) -> dict[str, Any]:
    return {"number": event.number, "type": event.type, "data": event.data, "at": event.at.isoformat()}


def _send(group: str, message: dict[str, Any]) -> None:
    """A hint may be lost (Redis is away): the browser asks for what it missed by number."""
    try:
        async_to_sync(get_channel_layer().group_send)(group, message)
    except Exception as error:  # whatever the transport throws: hints never break the work they tell of
        log.warning("a hint to %s was lost: %s", group, error)
