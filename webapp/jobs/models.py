"""Jobs and their numbered events: the truth about all background work. Celery only wakes somebody up."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import models
from django.utils.translation import gettext_lazy as _

if TYPE_CHECKING:
    from webapp.accounts.models import User


class JobQuerySet(models.QuerySet["Job"]):
    def of(self, user: User) -> JobQuerySet:
        return self.filter(owner=user)

    def active(self) -> JobQuerySet:
        return self.filter(state__in=Job.ACTIVE)

    def shown(self) -> JobQuerySet:
        """Those worth a person's attention: not the standing ones that wait for something to do."""
        return self.exclude(state=Job.State.IDLE)


class Job(models.Model):
    """One piece of background work.

    `attempt` is the fencing token: it grows with every claim, and each write of a worker holds only while it is
    still the number of the last claim. `beat` grows while the worker lives; a reaper that sees it stand still for
    a lease gives the job to somebody else, so no two clocks are ever compared. `wanted` grows with each wake-up: a
    wake-up during a run makes the job run once more.
    """

    class Kind(models.TextChoices):
        INGEST = "ingest", _("Taking in photos")
        PROTOTYPES = "prototypes", _("Learning labels")
        CLASSIFY = "classify", _("Classifying")
        TRAIN = "train", _("Training")

    class State(models.TextChoices):
        IDLE = "idle", _("waiting for work")
        QUEUED = "queued", _("queued")
        RUNNING = "running", _("running")
        SUCCEEDED = "succeeded", _("done")
        FAILED = "failed", _("failed")
        CANCELLED = "cancelled", _("cancelled")

    class Queue(models.TextChoices):
        INTERACTIVE = "interactive"
        INGEST = "ingest"
        TRAINING = "training"

    ACTIVE = (State.QUEUED, State.RUNNING)
    ENDED = (State.SUCCEEDED, State.FAILED, State.CANCELLED)

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="jobs")
    kind = models.CharField(max_length=16, choices=Kind)
    queue = models.CharField(max_length=16, choices=Queue)
    title = models.CharField(max_length=200)
    url = models.CharField(max_length=300, blank=True)
    key = models.CharField(max_length=100, null=True, blank=True, help_text="idempotency key, unique for an owner")  # noqa: DJ001

    state = models.CharField(max_length=16, choices=State, default=State.IDLE)
    wanted = models.PositiveIntegerField(default=0)
    claimed = models.PositiveIntegerField(default=0)
    attempt = models.PositiveIntegerField(default=0)
    tries = models.PositiveIntegerField(default=0)
    beat = models.PositiveBigIntegerField(default=0)
    worker = models.CharField(max_length=100, blank=True)
    cancel_requested = models.BooleanField(default=False)

    done = models.PositiveBigIntegerField(default=0)
    total = models.PositiveBigIntegerField(default=0)
    message = models.CharField(max_length=300, blank=True)
    error = models.TextField(blank=True)
    last_event = models.PositiveIntegerField(default=0)

    created = models.DateTimeField(auto_now_add=True)
    sent_at = models.DateTimeField(null=True)
    started = models.DateTimeField(null=True)
    finished = models.DateTimeField(null=True)

    objects = JobQuerySet.as_manager()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="one_job_a_key")]
        indexes = [models.Index(fields=["state", "queue"]), models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return f"{self.kind} {self.pk}"

    @property
    def is_active(self) -> bool:
        return self.state in self.ACTIVE

    @property
    def percent(self) -> int:
        return min(100, round(100 * self.done / self.total)) if self.total else 0

    def summary(self) -> dict[str, Any]:
        """What a page shows of a job; what the header's pill is made from."""
        return {
            "id": str(self.pk),
            "kind": self.kind,
            "title": self.title,
            "url": self.url,
            "state": self.state,
            "stateText": str(self.get_state_display()),
            "done": self.done,
            "total": self.total,
            "message": self.message,
            "error": self.error,
        }


class Event(models.Model):
    """A line in a job's log, numbered within the job from 1; old lines of a long log may be gone."""

    job = models.ForeignKey(Job, on_delete=models.CASCADE, related_name="events")
    number = models.PositiveIntegerField()
    type = models.CharField(max_length=32)
    data = models.JSONField(default=dict)
    at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["job", "number"], name="one_event_a_number")]
        ordering = ["job", "number"]

    def __str__(self) -> str:
        return f"{self.job_id} #{self.number} {self.type}"
