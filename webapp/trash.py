"""What was put away: for 30 days it can be brought back, then it is deleted for good, with the bytes nobody else needs.

Deleting on demand only moves that day to the next minutes, so that a slip can be undone. The janitor of the ingest
worker does the deleting, in pieces, so that nobody waits long for the database.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from django.core.files.storage import default_storage
from django.db import connection, transaction
from django.db.models import F, Max, OuterRef, Q, QuerySet, Subquery
from django.urls import reverse
from django.utils import timezone
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.labelsets.models import Classification, Example, LabelSet, Prediction, QueryImage
from webapp.library.models import Blob, Collection, Import, ImportFile, Photo, Shard
from webapp.training.models import TrainingRun

KEPT = timedelta(days=30)
UNDO = timedelta(minutes=2)
SETTLING = timedelta(minutes=10)  # in which what has just come may not be spoken of by any row yet
PIECE = 500
SHOWN = 50

Thing = Collection | LabelSet


@dataclass(frozen=True)
class PutAway:
    """A line of a page's list of what was put away."""

    name: str
    since: datetime
    restore_url: str
    delete_url: str

    @property
    def goes_at(self) -> datetime:
        return self.since + KEPT

    @property
    def is_going(self) -> bool:
        """Is it as good as deleted?"""
        return self.goes_at < timezone.now() + timedelta(hours=1)


def put_away_collections(user: User) -> list[PutAway]:
    return _listed(Collection.objects.filter(owner=user).shown(), "library")


def put_away_label_sets(user: User) -> list[PutAway]:
    return _listed(LabelSet.objects.filter(owner=user), "labelsets")


def put_away(thing: Thing) -> None:
    _rows(thing).filter(deleted_at=None).update(deleted_at=timezone.now())


def bring_back(thing: Thing) -> bool:
    """False when it is too late: it is being deleted."""
    in_time = Q(deleted_at=None) | Q(deleted_at__gt=timezone.now() - KEPT)
    return bool(_rows(thing).filter(in_time).update(deleted_at=None))


def delete_soon(thing: Thing) -> None:
    """Let what was put away be deleted for good in a moment; until then it can be brought back."""
    _rows(thing).filter(deleted_at__gt=timezone.now() - KEPT).update(deleted_at=timezone.now() - KEPT + UNDO)


def said_of(thing: Thing) -> str:
    """What the page answers when something is to be deleted for good."""
    words = _("“%(name)s” is deleted for good in %(n)d minutes.") % {
        "name": thing.name,
        "n": int(UNDO.total_seconds() // 60),
    }
    return f"{words} {_what_goes(thing)}" if isinstance(thing, Collection) else words


def _what_goes(collection: Collection) -> str:
    """A sentence about what deleting a collection for good takes along, and what stays."""
    photos = collection.photos.count()
    words = ngettext("%(n)d photo goes with it.", "%(n)d photos go with it.", photos) % {"n": photos}
    kept = Example.objects.current().filter(photo__collection=collection)
    sets = kept.order_by("label__label_set__name").values_list("label__label_set__name", flat=True)
    names = list(sets.distinct()[:3])
    if names:
        count = kept.values("photo").distinct().count()
        words += " " + ngettext(
            "%(n)d of them stays, as an example in %(names)s.", "%(n)d of them stay, as examples in %(names)s.", count
        ) % {"n": count, "names": ", ".join(f"“{name}”" for name in names)}
    return words


# For the janitor ----------------------------------------------------------------------------------


def delete_due() -> int:
    """Delete for good what has been put away for long enough; returns how many things went.

    A collection that is being trained on waits until that is over.
    """
    due = timezone.now() - KEPT
    label_sets = list(LabelSet.objects.filter(deleted_at__lte=due).select_related("drops"))
    trained_on = TrainingRun.objects.filter(job__state__in=Job.ACTIVE).exclude(collection=None).values("collection")
    collections = Collection.objects.filter(deleted_at__lte=due).shown().exclude(pk__in=trained_on)
    gone = 0
    for label_set in label_sets:
        _delete_label_set(label_set)
        gone += 1
    for collection in list(collections):
        _delete_collection(collection)
        gone += 1
    if gone:
        delete_orphans()
    return gone


def delete_orphans() -> int:
    """Delete blobs that no photo shows and no upload waits for, and shards without vectors; returns how many files."""
    waited_for = ImportFile.objects.filter(state=ImportFile.State.STORED).exclude(blob=None).values("blob")
    orphans = Blob.objects.filter(photos=None, created__lt=timezone.now() - SETTLING).exclude(pk__in=waited_for)
    gone = 0
    while blobs := list(orphans[:PIECE]):
        with transaction.atomic():
            orphans.filter(pk__in=[blob.pk for blob in blobs]).delete()
        gone += _delete_files(blobs)
    for shard in Shard.objects.filter(sealed=True, embeddings=None):
        shard.delete()
        default_storage.delete(shard.file_name)
        gone += 1
    return gone


def _delete_files(blobs: Iterable[Blob]) -> int:
    """The files of deleted rows, unless the same bytes came again meanwhile: whoever brings them waits for this.

    Rows go first, and files when that is certain; see `library.services` for the other side.
    """
    gone = 0
    with transaction.atomic():
        if connection.vendor == "postgresql":  # SQLite has one writer at a time anyway
            with connection.cursor() as cursor:
                cursor.execute(f"LOCK TABLE {Blob._meta.db_table} IN SHARE MODE")
        blobs = list(blobs)
        back = set(Blob.objects.filter(pk__in=[blob.pk for blob in blobs]).values_list("pk", flat=True))
        for blob in blobs:
            if blob.pk not in back:
                for name in (blob.original_name, blob.thumbnail_name, blob.working_name):
                    default_storage.delete(name)
                    gone += 1
    return gone


def _delete_label_set(label_set: LabelSet) -> None:
    keep_examples(label_set.drops, apart_from=label_set)
    batches = Classification.objects.filter(label_set=label_set)
    jobs = [label_set.job_id, *_import_jobs(label_set.drops), *batches.values_list("job", flat=True)]
    _in_pieces(Prediction.objects.filter(query__classification__in=batches))
    _in_pieces(QueryImage.objects.filter(classification__in=batches))
    _in_pieces(Example.objects.filter(label__label_set=label_set))
    _delete_photos(label_set.drops)
    with transaction.atomic():
        label_set.delete()
        label_set.drops.delete()
        Job.objects.filter(pk__in=jobs).delete()


def _delete_collection(collection: Collection) -> None:
    keep_examples(collection)
    batches = Classification.objects.filter(collection=collection)
    jobs = [*_import_jobs(collection), *batches.values_list("job", flat=True)]
    _in_pieces(Prediction.objects.filter(query__classification__in=batches))
    _delete_photos(collection)
    with transaction.atomic():
        collection.delete()
        Job.objects.filter(pk__in=jobs).delete()


def keep_examples(collection: Collection, *, apart_from: LabelSet | None = None) -> None:
    """Move the photos that label sets learn from to the drops of the first of these sets, so that no set loses any."""
    used = Example.objects.current().filter(photo__collection=collection).exclude(label__label_set=apart_from)
    for example in used.select_related("photo", "label__label_set").order_by("created", "pk"):
        drops = example.label.label_set.drops_id
        assert example.photo is not None  # a constraint of current examples
        with transaction.atomic():
            there = Photo.objects.filter(collection=drops, blob=example.photo.blob_id, category=None).first()
            if there is None:
                last = Photo.objects.filter(collection=drops).aggregate(last=Max("serial"))["last"] or 0
                here = Photo.objects.filter(pk=example.photo_id, collection=collection)
                here.update(collection=drops, category=None, serial=last + 1)
            elif Example.objects.current().filter(label=example.label, photo=there).exists():
                example.delete()  # the label has this very picture already
            elif example.photo.pk != there.pk:
                Example.objects.filter(pk=example.pk).update(photo=there)


def _delete_photos(collection: Collection) -> None:
    """Old versions of label sets keep the names of what they lose, never the pictures."""
    name = Subquery(Photo.objects.filter(pk=OuterRef("photo")).values("name")[:1])
    Example.objects.filter(photo__collection=collection).update(gap=name)
    _in_pieces(collection.photos.all())


def _in_pieces(rows: QuerySet[Any]) -> None:
    while ids := list(rows.order_by().values_list("pk", flat=True)[:PIECE]):
        with transaction.atomic():
            rows.model._default_manager.filter(pk__in=ids).delete()


def _import_jobs(collection: Collection) -> list[UUID]:
    return list(Import.objects.filter(collection=collection).values_list("job", flat=True))


def _rows(thing: Thing) -> Any:
    return type(thing)._default_manager.filter(pk=thing.pk)


def _listed(rows: Any, area: str) -> list[PutAway]:
    found = rows.filter(deleted_at__isnull=False).order_by(F("deleted_at").desc())[:SHOWN]
    return [
        PutAway(
            one.name,
            one.deleted_at,
            reverse(f"{area}:restore", args=[one.pk]),
            reverse(f"{area}:delete-for-good", args=[one.pk]),
        )
        for one in found
    ]
