"""Models that can classify, and the runs that make them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import models
from django.db.models import Case, Q, When
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy

from fewshot_engine.config import ENCODERS, TrainConfig
from webapp.jobs.models import Job
from webapp.library.models import Collection

if TYPE_CHECKING:
    from webapp.accounts.models import User


ACCURATE, FAST = "accurate", ENCODERS["fast"][0]
DEFAULT_ENCODER = ACCURATE  # of new label sets and of what is embedded at once; FAST where the machine is slow


class ModelQuerySet(models.QuerySet["Model"]):
    def usable_by(self, user: User) -> ModelQuerySet:
        return self.filter(Q(owner=None) | Q(owner=user))

    def default(self) -> Model:
        """The built-in one that label sets begin with."""
        return self.get(owner=None, backbone=DEFAULT_ENCODER, kind=Model.Kind.BUILT_IN)

    def built_in_first(self) -> ModelQuerySet:
        """The default, the other one as it came, then those that runs have made, the newest first."""
        is_default = Case(When(kind=Model.Kind.BUILT_IN, backbone=DEFAULT_ENCODER, then=0), default=1)
        return self.order_by(is_default, Case(When(kind=Model.Kind.BUILT_IN, then=0), default=1), "-created")


class Model(models.Model):
    """An encoder that can be used: a built-in one, or what a run has made.

    `backbone` names the embeddings it reads: an encoder's (ENCODERS), or a single backbone's. An adapted model reads
    those of the encoder it was adapted from and applies its recipe to them; a fully trained one has its own.
    """

    class Kind(models.TextChoices):
        BUILT_IN = "built-in", gettext_lazy("as it came")
        ADAPT = "adapt", gettext_lazy("adapted")
        FULL = "full", gettext_lazy("fully trained")

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

    @property
    def good_for(self) -> str:
        """A sentence that helps to choose."""
        if self.kind == self.Kind.ADAPT:
            return _("Adapted to your own photos; at its best on photos like those that it learned from.")
        if self.kind == self.Kind.FULL:
            return _("Trained on your own photos from the pixels; at its best on subjects like those.")
        if self.backbone == ACCURATE:
            return _("Three networks look at each photo: better at things that look alike, slower with new photos.")
        return _("One network looks at each photo: new photos are taken in sooner, things that look alike mix more.")


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
