"""Models that can classify, and the runs that make them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.urls import reverse
from django.utils.translation import gettext_lazy as _

from fewshot_engine.config import DEFAULT_ENCODER, TrainConfig
from webapp.jobs.models import Job
from webapp.library.models import Collection

if TYPE_CHECKING:
    from webapp.accounts.models import User


class ModelQuerySet(models.QuerySet["Model"]):
    def usable_by(self, user: User) -> ModelQuerySet:
        return self.filter(Q(owner=None) | Q(owner=user))

    def default(self) -> Model:
        return self.get(owner=None, backbone=DEFAULT_ENCODER, kind=Model.Kind.BUILT_IN)


class Model(models.Model):
    """An encoder that can be used: a built-in one, or what a run has made.

    `backbone` names the embeddings it reads; an adapted model reads those of the backbone it was adapted from and
    applies its recipe to them, a fully trained one has embeddings of its own.
    """

    class Kind(models.TextChoices):
        BUILT_IN = "built-in", _("as it came")
        ADAPT = "adapt", _("adapted")
        FULL = "full", _("fully trained")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True, related_name="models")
    name = models.CharField(max_length=120)
    kind = models.CharField(max_length=8, choices=Kind)
    backbone = models.CharField(max_length=100)
    folder = models.CharField(max_length=200, blank=True, help_text="where its weights are, in the storage")
    card = models.JSONField(default=dict)
    created = models.DateTimeField(auto_now_add=True)

    objects = ModelQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["backbone"], condition=Q(kind="built-in"), name="one_built_in_model_a_backbone"
            )
        ]
        ordering = ["-created"]

    def __str__(self) -> str:
        return self.name


class RunQuerySet(models.QuerySet["TrainingRun"]):
    def of(self, user: User) -> RunQuerySet:
        return self.filter(owner=user).select_related("job", "collection", "model")


class TrainingRun(models.Model):
    """A frozen configuration, what became of it, and the model it made."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="runs")
    name = models.CharField(max_length=120)
    collection = models.ForeignKey(Collection, on_delete=models.SET_NULL, null=True, related_name="runs")
    job = models.OneToOneField(Job, on_delete=models.CASCADE, related_name="run")
    config = models.JSONField()
    plan = models.JSONField(
        default=dict, help_text="the class split and what was shrunk or left out, frozen at the start"
    )
    checkpoint = models.CharField(max_length=100, blank=True, help_text="the file in its folder to go on from")
    baseline = models.JSONField(null=True)
    best = models.JSONField(null=True)
    recommends = models.CharField(max_length=16, blank=True)
    model = models.OneToOneField(Model, on_delete=models.SET_NULL, null=True, related_name="run")
    created = models.DateTimeField(auto_now_add=True)

    objects = RunQuerySet.as_manager()

    class Meta:
        ordering = ["-created"]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("training:run", args=[self.pk])

    @property
    def folder(self) -> str:
        return f"runs/{self.pk}"

    @property
    def baseline_episodes(self) -> int:
        """How many episodes every score of the run is made on."""
        return int((self.baseline or {}).get("episodes", 0))

    def train_config(self) -> TrainConfig:
        return TrainConfig.from_dict(self.config)


class Metric(models.Model):
    """A point of a run's curves; one a kind and episode, however often the episode is run again."""

    class Kind(models.TextChoices):
        STEP = "step"
        EVALUATION = "evaluation"

    run = models.ForeignKey(TrainingRun, on_delete=models.CASCADE, related_name="metrics")
    kind = models.CharField(max_length=10, choices=Kind)
    episode = models.PositiveIntegerField()
    epoch = models.PositiveIntegerField()
    loss = models.FloatField()
    accuracy = models.FloatField(null=True)
    ci95 = models.FloatField(null=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["run", "kind", "episode"], name="one_metric_an_episode")]
        ordering = ["episode"]

    def __str__(self) -> str:
        return f"{self.kind} at {self.episode}"

    @property
    def percent(self) -> float | None:
        return None if self.accuracy is None else 100 * self.accuracy

    @property
    def margin(self) -> float | None:
        return None if self.ci95 is None else 100 * self.ci95
