"""Photos and where they lie: collections of categories, blobs stored once an owner, imports and their files."""

from __future__ import annotations

import unicodedata
import uuid
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.db import models
from django.db.models import Count, Exists, OuterRef, Q
from django.urls import reverse
from django.utils.translation import gettext_lazy as _

from webapp.jobs.models import Job

if TYPE_CHECKING:
    from webapp.accounts.models import User


class CollectionQuerySet(models.QuerySet["Collection"]):
    def of(self, user: User) -> CollectionQuerySet:
        return self.filter(owner=user, deleted_at=None)

    def shown(self) -> CollectionQuerySet:
        """Those a person made; a label set's own one for drops is found on its page."""
        return self.filter(purpose=Collection.Purpose.LIBRARY)

    def with_photos(self) -> CollectionQuerySet:
        return self.filter(Exists(Photo.objects.filter(collection=OuterRef("pk"))))

    def with_counts(self) -> CollectionQuerySet:
        return self.annotate(
            photo_count=Count("photos", distinct=True),
            category_count=Count("photos__category", distinct=True),
        )


class Collection(models.Model):
    """A user's photos, arranged in categories by their folders."""

    class Purpose(models.TextChoices):
        LIBRARY = "library"
        DROPS = "drops", _("photos dropped on a label set")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="collections")
    name = models.CharField(max_length=120)
    purpose = models.CharField(max_length=16, choices=Purpose, default=Purpose.LIBRARY)
    created = models.DateTimeField(auto_now_add=True)
    deleted_at = models.DateTimeField(null=True, blank=True)

    objects = CollectionQuerySet.as_manager()

    class Meta:
        indexes = [models.Index(fields=["owner", "-created"])]

    def __str__(self) -> str:
        return self.name

    def get_absolute_url(self) -> str:
        return reverse("library:collection", args=[self.pk])


class Category(models.Model):
    """A class folder of a collection. `key` is its path in one Unicode form and case, so that there is one of each."""

    collection = models.ForeignKey(Collection, on_delete=models.CASCADE, related_name="categories")
    parent = models.ForeignKey("self", on_delete=models.CASCADE, null=True, blank=True, related_name="children")
    name = models.CharField(max_length=255)
    path = models.CharField(max_length=1000)
    key = models.CharField(max_length=1000)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["collection", "key"], name="one_category_a_path")]
        ordering = ["path"]

    def __str__(self) -> str:
        return self.path

    @property
    def depth(self) -> int:
        return self.path.count("/")

    @staticmethod
    def key_of(path: str) -> str:
        return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


class Blob(models.Model):
    """One stored original of an owner, named by its sha256, with what is derived from it."""

    class State(models.TextChoices):
        STORED = "stored", _("not looked at yet")
        READY = "ready"
        REFUSED = "refused"

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, on_delete=models.CASCADE, related_name="blobs")
    sha256 = models.CharField(max_length=64)
    size = models.PositiveBigIntegerField()
    state = models.CharField(max_length=8, choices=State, default=State.STORED)
    reason = models.CharField(max_length=300, blank=True)
    notes = models.JSONField(default=list)
    format = models.CharField(max_length=16, blank=True)
    width = models.PositiveIntegerField(default=0)
    height = models.PositiveIntegerField(default=0)
    captured_at = models.DateTimeField(null=True, blank=True)
    created = models.DateTimeField(auto_now_add=True, help_text="when its bytes last came")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "sha256"], name="one_blob_a_content")]

    def __str__(self) -> str:
        return self.sha256[:12]

    @classmethod
    def named(cls, owner_id: uuid.UUID, sha256: str, size: int) -> Blob:
        """The row of these bytes, not saved; its key follows from them, so nobody has to look it up first."""
        return cls(pk=uuid.uuid5(owner_id, sha256), owner_id=owner_id, sha256=sha256, size=size)

    @property
    def original_name(self) -> str:
        return blob_name(self.owner_id, self.sha256, "original")

    @property
    def thumbnail_name(self) -> str:
        return blob_name(self.owner_id, self.sha256, "thumb.jpg")

    @property
    def working_name(self) -> str:
        return blob_name(self.owner_id, self.sha256, "work.jpg")


def blob_name(owner_id: object, sha256: str, what: str) -> str:
    return f"blobs/{owner_id}/{sha256[:2]}/{sha256}.{what}"


class PhotoQuerySet(models.QuerySet["Photo"]):
    def of(self, user: User) -> PhotoQuerySet:
        return self.filter(collection__owner=user, collection__deleted_at=None)


class Photo(models.Model):
    """A blob's place in a collection and category; made once its blob was found to be a good photo."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    blob = models.ForeignKey(Blob, on_delete=models.PROTECT, related_name="photos")
    collection = models.ForeignKey(Collection, on_delete=models.CASCADE, related_name="photos")
    category = models.ForeignKey(Category, on_delete=models.SET_NULL, null=True, blank=True, related_name="photos")
    name = models.CharField(max_length=255)
    serial = models.PositiveBigIntegerField(default=0, help_text="its place in the collection, for paging")
    created = models.DateTimeField(auto_now_add=True)

    objects = PhotoQuerySet.as_manager()

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["collection", "category", "blob"], name="one_photo_a_place"),
            models.UniqueConstraint(
                fields=["collection", "blob"], condition=Q(category=None), name="one_unlabelled_photo_a_place"
            ),
        ]
        indexes = [models.Index(fields=["collection", "serial"]), models.Index(fields=["category", "serial"])]

    def __str__(self) -> str:
        return self.name

    @property
    def thumbnail_url(self) -> str:
        return reverse("library:photo-file", args=[self.pk, "thumb"])

    @property
    def working_url(self) -> str:
        return reverse("library:photo-file", args=[self.pk, "work"])


class Import(models.Model):
    """One upload into a collection: files one by one, or a zip; it can be resumed until it is finished."""

    class State(models.TextChoices):
        OPEN = "open", _("uploading")
        CLOSED = "closed", _("all sent, being taken in")
        DONE = "done", _("taken in")

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    collection = models.ForeignKey(Collection, on_delete=models.CASCADE, related_name="imports")
    job = models.OneToOneField(Job, on_delete=models.CASCADE, related_name="ingest")
    state = models.CharField(max_length=8, choices=State, default=State.OPEN)
    archive_name = models.CharField(max_length=255, blank=True)
    archive_size = models.PositiveBigIntegerField(default=0)
    archive_chunks = models.PositiveIntegerField(default=0)
    archive_next = models.PositiveIntegerField(default=0, help_text="how many entries of the archive are taken in")
    notices = models.JSONField(default=list)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"import {self.pk}"

    def chunk_name(self, number: int) -> str:
        return f"archives/{self.pk}/{number:06d}.chunk"

    def counts(self) -> dict[str, int]:
        """How many files are in each state; states without files are zero."""
        found = dict(self.files.values_list("state").annotate(n=Count("id")))
        return {state: found.get(state, 0) for state in ImportFile.State.values}

    def report(self) -> dict[str, Any]:
        counts = self.counts()
        return {"counts": counts, "total": sum(counts.values()), "notices": self.notices, "state": self.state}


class ImportFile(models.Model):
    """What became of one file of an import."""

    class State(models.TextChoices):
        WANTED = "wanted", _("not sent yet")
        STORED = "stored", _("being looked at")
        ACCEPTED = "accepted", _("accepted")
        DUPLICATE = "duplicate", _("already there")
        REFUSED = "refused", _("refused")
        SKIPPED = "skipped", _("left out")

    batch = models.ForeignKey(Import, on_delete=models.CASCADE, related_name="files")
    path = models.CharField(max_length=1000)
    size = models.PositiveBigIntegerField(default=0)
    sha256 = models.CharField(max_length=64, blank=True)
    state = models.CharField(max_length=9, choices=State, default=State.WANTED)
    reason = models.CharField(max_length=300, blank=True)
    blob = models.ForeignKey(Blob, on_delete=models.SET_NULL, null=True, related_name="+")
    photo = models.ForeignKey(Photo, on_delete=models.SET_NULL, null=True, related_name="+")

    class Meta:
        constraints = [models.UniqueConstraint(fields=["batch", "path"], name="one_file_a_path")]
        indexes = [models.Index(fields=["batch", "state"])]

    def __str__(self) -> str:
        return self.path


class Shard(models.Model):
    """A file of float32 rows with one writer; `rows` is how many of them count."""

    id = models.UUIDField(primary_key=True, default=uuid.uuid4, editable=False)
    backbone = models.CharField(max_length=100)
    dim = models.PositiveIntegerField()
    rows = models.PositiveIntegerField(default=0)
    sealed = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"{self.backbone} {self.pk}"

    @property
    def file_name(self) -> str:
        return f"vectors/{self.backbone}/{self.pk}.f32"


class Embedding(models.Model):
    """Where the vector of a blob under a backbone is: a shard and a row. Computed once, kept."""

    blob = models.ForeignKey(Blob, on_delete=models.CASCADE, related_name="embeddings")
    backbone = models.CharField(max_length=100)
    shard = models.ForeignKey(Shard, on_delete=models.CASCADE, related_name="embeddings")
    row = models.PositiveIntegerField()

    class Meta:
        constraints = [models.UniqueConstraint(fields=["blob", "backbone"], name="one_embedding_a_backbone")]

    def __str__(self) -> str:
        return f"{self.backbone} of {self.blob_id}"
