"""Personal label sets, their examples through all versions, and what was classified with them."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.urls import reverse
from django.utils.translation import gettext_lazy as _

from webapp.jobs.models import Job
from webapp.library.models import Collection, Import, Photo
from webapp.training.models import Model

if TYPE_CHECKING:
    from webapp.accounts.models import User

TONES = 8


class LabelSetQuerySet(models.QuerySet["LabelSet"]):
    def of(self, user: User) -> LabelSetQuerySet:
        return self.filter(owner=user, deleted_at=None)


class LabelSet(models.Model):
    """A user's own labels on one model. Every gesture that changes labels or examples is one new `version`."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="label_sets")
    name = models.CharField(max_length=120)
    model = models.ForeignKey(Model, on_delete=models.PROTECT, related_name="label_sets")
    version = models.PositiveIntegerField(default=1)
    drops = models.OneToOneField(Collection, on_delete=models.PROTECT, related_name="label_set")
    job = models.OneToOneField(Job, on_delete=models.PROTECT, related_name="label_set")
    reject_above = models.FloatField(default=0.5, help_text="probability of a stranger above which nothing fits")
    created = models.DateTimeField(auto_now_add=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = LabelSetQuerySet.as_manager()

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(reject_above__gt=0) & Q(reject_above__lte=1), name="reject_above_is_share"
            )
        ]
        indexes = [models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("labelsets:label-set", args=[self.pk])


class VersionedQuerySet(models.QuerySet):  # type: ignore[type-arg]
    def current(self) -> VersionedQuerySet:
        return self.filter(to_version=None)


class Label(models.Model):
    """A personal category; it holds from one version of its set up to another (excluded)."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    label_set = models.ForeignKey(LabelSet, on_delete=models.CASCADE, related_name="labels")
    name = models.CharField(max_length=80)
    tone = models.PositiveSmallIntegerField(default=1)
    from_version = models.PositiveIntegerField()
    to_version = models.PositiveIntegerField(null=True, blank=True)
    created = models.DateTimeField(auto_now_add=True)

    objects = VersionedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["label_set", "name"], condition=Q(to_version=None), name="one_label_a_name")
        ]
        ordering = ["created"]

    def __str__(self) -> str:
        return self.name


class Example(models.Model):
    """A support photo of a label, in the versions from which and up to which it holds."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    label = models.ForeignKey(Label, on_delete=models.CASCADE, related_name="examples")
    photo = models.ForeignKey(Photo, on_delete=models.SET_NULL, null=True, related_name="examples")
    gap = models.CharField(max_length=255, blank=True, help_text="the name of a photo that was deleted for good")
    from_version = models.PositiveIntegerField()
    to_version = models.PositiveIntegerField(null=True, blank=True)
    created = models.DateTimeField(auto_now_add=True)

    objects = VersionedQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["label", "photo"], condition=Q(to_version=None), name="one_example_a_photo"
            ),
            models.CheckConstraint(
                condition=Q(photo__isnull=False) | Q(to_version__isnull=False), name="current_examples_have_photos"
            ),
        ]
        ordering = ["created"]

    def __str__(self) -> str:
        return f"{self.photo_id} of {self.label_id}"


class PrototypeSet(models.Model):
    """What the engine made of a version's examples; found by its key, so nothing is ever marked stale."""

    label_set = models.ForeignKey(LabelSet, on_delete=models.CASCADE, related_name="prototype_sets")
    version = models.PositiveIntegerField()
    model = models.ForeignKey(Model, on_delete=models.CASCADE)
    engine_version = models.CharField(max_length=16)
    labels = models.JSONField(help_text="ids of the labels, in the order of the prototypes")
    examples = models.JSONField(help_text="ids of the photos, in the order of the support rows")
    data = models.BinaryField()
    health = models.JSONField(default=dict, help_text="expected accuracy of the set and of each label")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(
                fields=["label_set", "version", "model", "engine_version"], name="one_prototype_set_a_key"
            )
        ]

    def __str__(self) -> str:
        return f"prototypes of {self.label_set_id} v{self.version}"


class Classification(models.Model):
    """A batch of photos against a label set, with an address of its own; each re-sorting is a revision."""

    class Source(models.TextChoices):
        DROP = "drop", _("dropped photos")
        COLLECTION = "collection", _("a collection")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    label_set = models.ForeignKey(LabelSet, on_delete=models.CASCADE, related_name="classifications")
    name = models.CharField(max_length=120)
    source = models.CharField(max_length=10, choices=Source)
    collection = models.ForeignKey(Collection, on_delete=models.CASCADE, related_name="+")
    top_k = models.PositiveSmallIntegerField(default=3)
    job = models.OneToOneField(Job, on_delete=models.PROTECT, related_name="classification")
    revision = models.PositiveIntegerField(default=0)
    prototypes = models.ForeignKey(PrototypeSet, on_delete=models.SET_NULL, null=True, related_name="+")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [
            models.CheckConstraint(condition=Q(top_k__gte=1) & Q(top_k__lte=20), name="top_k_is_small"),
        ]
        indexes = [models.Index(fields=["label_set", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("labelsets:classification", args=[self.label_set_id, self.pk])


class QueryImage(models.Model):
    """A photo of a classification, and what a person has said of it: a label, or that none fits. That is pinned."""

    classification = models.ForeignKey(Classification, on_delete=models.CASCADE, related_name="query_images")
    photo = models.ForeignKey(Photo, on_delete=models.CASCADE, related_name="+")
    is_answered = models.BooleanField(default=False)
    answer = models.ForeignKey(Label, on_delete=models.SET_NULL, null=True, blank=True, related_name="+")
    answered_at = models.DateTimeField(null=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["classification", "photo"], name="one_query_a_photo"),
            models.CheckConstraint(condition=Q(is_answered=True) | Q(answer=None), name="answers_are_answered"),
        ]

    def __str__(self) -> str:
        return f"query {self.photo_id}"


class Prediction(models.Model):
    """What the label set says of a query image in one revision. Thresholds are applied when it is read."""

    query = models.ForeignKey(QueryImage, on_delete=models.CASCADE, related_name="predictions")
    revision = models.PositiveIntegerField()
    label = models.ForeignKey(Label, on_delete=models.CASCADE, related_name="+")
    confidence = models.FloatField(help_text="given that the photo is one of these")
    distance = models.FloatField(help_text="cosine distance to the prototype")
    stranger = models.FloatField(help_text="probability that it is none of these")
    top_k = models.JSONField(help_text="[[label id, confidence, distance], …], best first")
    evidence = models.JSONField(default=list, help_text="[[photo id, label id, similarity], …] of the nearest examples")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["query", "revision"], name="one_prediction_a_revision")]

    def __str__(self) -> str:
        return f"{self.query_id} r{self.revision}: {self.label_id}"


class Intake(models.Model):
    """What a drop of photos on a label set is for: examples of a label, or query images of a classification."""

    batch = models.OneToOneField(Import, on_delete=models.CASCADE, related_name="intake")
    label_set = models.ForeignKey(LabelSet, on_delete=models.CASCADE, related_name="intakes")
    label = models.ForeignKey(Label, on_delete=models.CASCADE, null=True, related_name="+")
    replaces = models.ForeignKey(
        Example,
        on_delete=models.SET_NULL,
        null=True,
        related_name="+",
        help_text="the example that they take the place of",
    )
    classification = models.ForeignKey(Classification, on_delete=models.CASCADE, null=True, related_name="intakes")

    class Meta:
        constraints = [
            models.CheckConstraint(
                condition=Q(label=None, classification__isnull=False) | Q(label__isnull=False, classification=None),
                name="an_intake_has_one_aim",
            )
        ]

    def __str__(self) -> str:
        return f"intake {self.batch_id}"
