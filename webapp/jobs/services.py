"""The life of a job: made, woken, claimed, reported on, ended. Every change is a conditional update on its row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.conf import settings
from django.db import transaction
from django.db.models import F
from django.utils import timezone
from django.utils.translation import gettext as _

from webapp import live, queue
from webapp.accounts.models import User
from webapp.jobs.models import Event, Job

KEPT_EVENTS = 300  # of a standing job, which runs again and again


class LeaseLost(Exception):
    """Somebody else has the job now: stop at once, write nothing."""


@dataclass(frozen=True)
class Claim:
    """The right to work on a job, as long as nobody claims it anew."""

    job_id: UUID
    attempt: int
    wanted: int


def create_job(
    owner: User, kind: Job.Kind, *, queue: Job.Queue, title: str, url: str = "", key: str | None = None
) -> Job:
    """A job that nobody works on yet; with a key, the same call twice gives the same job."""
    values = {"kind": kind, "queue": queue, "title": title[:200], "url": url}
    if key is None:
        return Job.objects.create(owner=owner, **values)
    return Job.objects.get_or_create(owner=owner, key=key, defaults=values)[0]


def wake(job_id: UUID) -> None:
    """See to it that the job runs after this transaction, once more if it is running now."""
    woken = (
        Job.objects.filter(pk=job_id)
        .exclude(state__in=Job.ACTIVE)
        .update(
            state=Job.State.QUEUED,
            wanted=F("wanted") + 1,
            tries=0,
            error="",
            cancel_requested=False,
            finished=None,
            sent_at=timezone.now(),
        )
    )
    if not woken:
        Job.objects.filter(pk=job_id).update(wanted=F("wanted") + 1)
        return
    job = Job.objects.get(pk=job_id)
    live.publish_summary(job)
    transaction.on_commit(lambda: queue.send(job.pk, job.queue))


def claim(job_id: UUID | str, *, worker: str) -> Claim | None:
    """Take a queued job; None when it is not there to be taken (a message that came twice, or too late)."""
    with transaction.atomic():
        taken = Job.objects.filter(pk=job_id, state=Job.State.QUEUED).update(
            state=Job.State.RUNNING,
            attempt=F("attempt") + 1,
            tries=F("tries") + 1,
            claimed=F("wanted"),
            beat=F("beat") + 1,
            worker=worker[:100],
            started=timezone.now(),
        )
        if not taken:
            return None
        job = Job.objects.get(pk=job_id)
        live.publish_summary(job)
    return Claim(job_id=job.pk, attempt=job.attempt, wanted=job.wanted)


def beat(claim: Claim) -> bool:
    """A sign of life; False when the job is no longer this claim's."""
    return bool(_held(claim).update(beat=F("beat") + 1))


@contextmanager
def fenced(claim: Claim, **changes: Any) -> Iterator[None]:
    """One transaction whose writes hold only while the claim does.

    Raises:
        LeaseLost: somebody else has claimed the job, or it was ended; nothing is written.
    """
    with transaction.atomic():
        if not _held(claim).update(beat=F("beat") + 1, **changes):
            raise LeaseLost(f"job {claim.job_id}, attempt {claim.attempt}")
        yield


def record(job_id: UUID, type: str, **data: Any) -> Event:
    """Add a line to the job's log, inside the caller's transaction."""
    with transaction.atomic():
        Job.objects.filter(pk=job_id).update(last_event=F("last_event") + 1)
        job = Job.objects.get(pk=job_id)
        event = Event.objects.create(job=job, number=job.last_event, type=type, data=data)
        live.publish(event)
        live.publish_summary(job)
    return event


def report(claim: Claim, type: str, *, changes: dict[str, Any] | None = None, **data: Any) -> None:
    """Progress: the job's own figures (`done`, `total`, `message`) and a line in its log, fenced."""
    with fenced(claim, **(changes or {})):
        record(claim.job_id, type, **data)


def cancel_is_wanted(claim: Claim) -> bool:
    return bool(_held(claim).filter(cancel_requested=True).exists())


def finish(claim: Claim, state: Job.State, *, message: str = "", error: str = "") -> None:
    """End the claim's run: in an end state, or IDLE for a standing job. A wake-up meanwhile queues it again."""
    with fenced(claim):
        job = Job.objects.get(pk=claim.job_id)
        if state in (Job.State.IDLE, Job.State.SUCCEEDED) and job.wanted != job.claimed:
            _requeue(job, tries=0)
            return
        Job.objects.filter(pk=job.pk).update(
            state=state, message=message[:300], error=error, tries=0, worker="", finished=timezone.now()
        )
        last = record(job.pk, str(state), message=message, error=error)
        if state == Job.State.IDLE:
            Event.objects.filter(job=job, number__lte=last.number - KEPT_EVENTS).delete()


def hand_back(claim: Claim) -> None:
    """Queue the job again from where it is: the worker was asked to leave. Costs no try."""
    with fenced(claim):
        job = Job.objects.get(pk=claim.job_id)
        _requeue(job, tries=max(0, job.tries - 1))


def give_up_lease(job_id: UUID | str, attempt: int) -> None:
    """The worker of this attempt is gone: queue the job again, or fail it when it had its tries."""
    with transaction.atomic():
        job = Job.objects.filter(pk=job_id, attempt=attempt, state=Job.State.RUNNING).select_for_update().first()
        if job is None:
            return
        if job.cancel_requested:
            Job.objects.filter(pk=job.pk).update(state=Job.State.CANCELLED, worker="", finished=timezone.now())
            record(job.pk, "cancelled", message=_("Cancelled."))
        elif job.tries < settings.JOB_MAX_TRIES:
            record(job.pk, "retrying", tries=job.tries, message=_("The worker stopped; going on from the last step."))
            _requeue(job, tries=job.tries)
        else:
            error = _(
                "The worker stopped %(tries)d times on this job, most likely for want of memory. "
                "Smaller photos, a smaller image size or fewer episodes a step need less."
            ) % {"tries": job.tries}
            Job.objects.filter(pk=job.pk).update(
                state=Job.State.FAILED, error=error, worker="", finished=timezone.now()
            )
            record(job.pk, "failed", error=error)


def request_cancel(job: Job) -> None:
    """Stop the job: at once if nobody works on it, else as soon as its worker looks."""
    with transaction.atomic():
        stopped = Job.objects.filter(pk=job.pk, state=Job.State.QUEUED).update(
            state=Job.State.CANCELLED, finished=timezone.now()
        )
        if stopped:
            record(job.pk, "cancelled", message=_("Cancelled before it began."))
        elif Job.objects.filter(pk=job.pk, state=Job.State.RUNNING).update(cancel_requested=True):
            record(job.pk, "stopping", message=_("Stopping…"))


def retry(job: Job) -> bool:
    """Queue a job again that failed or was cancelled; it goes on from what is kept. False when it did neither."""
    with transaction.atomic():
        ended = Job.objects.select_for_update().filter(pk=job.pk, state__in=(Job.State.FAILED, Job.State.CANCELLED))
        if ended.first() is None:
            return False
        record(job.pk, "continued", message=_("Started again; it goes on from what is kept."))
        wake(job.pk)
    return True


def resend_unheard(queue_name: str, *, waiting_messages: int, after: timedelta) -> int:
    """Send queued jobs again whose message may be lost; returns how many. Harmless when it was not: see `claim`."""
    queued = Job.objects.filter(state=Job.State.QUEUED, queue=queue_name)
    if waiting_messages >= queued.count():
        return 0
    now = timezone.now()
    unheard = list(queued.filter(sent_at__lt=now - after)[:100])
    Job.objects.filter(pk__in=[job.pk for job in unheard]).update(sent_at=now)
    return sum(queue.send(job.pk, queue_name) for job in unheard)


def _held(claim: Claim) -> Any:
    return Job.objects.filter(pk=claim.job_id, attempt=claim.attempt, state=Job.State.RUNNING)


def _requeue(job: Job, *, tries: int) -> None:
    Job.objects.filter(pk=job.pk).update(
        state=Job.State.QUEUED, tries=tries, worker="", cancel_requested=False, sent_at=timezone.now()
    )
    transaction.on_commit(lambda: queue.send(job.pk, job.queue))
