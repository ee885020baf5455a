"""Taking photos in: a manifest says what is there, each file comes in one idempotent PUT, a worker looks at them.

Bytes come first and rows after: no row that is committed speaks of bytes that are not on the disk. The name is given
inside the row's transaction, for what was orphaned may be being deleted meanwhile (webapp/trash.py).
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import UUID

from django.conf import settings
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import UploadedFile
from django.db import transaction
from django.db.models import Max
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.accounts.models import User
from webapp.jobs.models import Job
from webapp.jobs.services import Claim, create_job, fenced, record, wake
from webapp.library.models import Blob, Category, Collection, Import, ImportFile, Photo
from webapp.library.storage import Received, receive

PHOTO_ENDINGS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "heic", "heif", "avif")
)
MAX_DEPTH = 8


class UploadError(Exception):
    """An upload that cannot be taken; the text is meant for the person, `status` for their browser."""

    def __init__(self, message: str, *, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Entry:
    """One line of a manifest: a file's path below the chosen folder, its size, and its sha256 if it is known."""

    path: str
    size: int
    sha256: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a worker found when it looked at a stored blob: a photo, or the reason why it is none."""

    file: ImportFile
    refusal: str = ""
    format: str = ""
    width: int = 0
    height: int = 0
    notes: tuple[str, ...] = ()
    captured_at: datetime | None = None


def create_collection(
    owner: User, name: str, *, purpose: Collection.Purpose = Collection.Purpose.LIBRARY
) -> Collection:
    name = " ".join(name.split())[:120] or _("Untitled collection")
    return Collection.objects.create(owner=owner, name=name, purpose=purpose)


def rename_collection(collection: Collection, name: str) -> None:
    Collection.objects.filter(pk=collection.pk).update(name=" ".join(name.split())[:120])


def open_import(
    collection: Collection,
    *,
    title: str = "",
    url: str = "",
    queue: Job.Queue = Job.Queue.INGEST,
    archive_name: str = "",
    archive_size: int = 0,
) -> Import:
    """Begin an upload into a collection; `archive_size` in bytes says that a zip will come in chunks."""
    if archive_size > settings.MAX_ZIP_BYTES:
        raise UploadError(
            _("The zip has %(size).1f GB; at most %(limit)d GB are taken at once. Split it, or choose its folder.")
            % {"size": archive_size / 1e9, "limit": settings.MAX_ZIP_BYTES // 1024**3},
            status=413,
        )
    with transaction.atomic():
        job = create_job(
            collection.owner,
            Job.Kind.INGEST,
            queue=queue,
            title=title or _("Taking in %(name)s") % {"name": collection.name},
            url=url or collection.get_absolute_url(),
        )
        return Import.objects.create(
            collection=collection,
            job=job,
            archive_name=archive_name[:255],
            archive_size=archive_size,
            archive_chunks=-(-archive_size // settings.ZIP_CHUNK_BYTES),
        )


def add_to_manifest(batch: Import, entries: Sequence[Entry]) -> list[ImportFile]:
    """Say what shall come; the answer says of each file what is still wanted. Calling it again changes nothing.

    A file whose bytes are here already is not asked for again.
    """
    _require_open(batch)
    entries = _without_repeats(entries)
    with transaction.atomic():
        known = {f.path: f for f in batch.files.filter(path__in=[e.path for e in entries])}
        hashes = {e.sha256 for e in entries if e.sha256 and e.path not in known}
        blobs = {b.sha256: b for b in Blob.objects.filter(owner_id=batch.collection.owner_id, sha256__in=hashes)}
        fresh = [_judge(batch, e, blobs.get(e.sha256)) for e in entries if e.path not in known]
        ImportFile.objects.bulk_create(fresh)
        if any(f.state == ImportFile.State.STORED for f in fresh):
            wake(batch.job_id)
    by_path = known | {f.path: f for f in fresh}
    return [by_path[e.path] for e in entries]


def store_photo(file: ImportFile, chunks: Iterable[bytes]) -> ImportFile:
    """Take the bytes of one file of a manifest: to the disk first, then its rows, then a worker is woken.

    Raises:
        UploadError: the bytes are too many, or not those that the browser hashed.
    """
    if file.state != ImportFile.State.WANTED:
        return file  # it came before: this is a repetition after a lost answer
    batch = file.batch
    _require_open(batch)
    received = _receive_within(chunks, settings.MAX_PHOTO_BYTES, near=_owner_folder(batch))
    try:
        if file.sha256 and received.sha256 != file.sha256:
            raise UploadError(_("%(path)s arrived damaged; it will be sent again.") % {"path": file.path}, status=422)
        with transaction.atomic():
            (blob,) = keep_blobs(batch.collection.owner_id, [received])
            file.blob, file.sha256, file.state = blob, blob.sha256, ImportFile.State.STORED
            ImportFile.objects.filter(pk=file.pk).update(blob=blob, sha256=file.sha256, state=file.state)
            wake(batch.job_id)
    finally:
        received.path.unlink(missing_ok=True)
    return file


def take_form_files(batch: Import, files: Sequence[UploadedFile[Any]]) -> None:
    """A whole upload at once: the files of a plain form, each kept even where two have the same name."""
    by_path: dict[str, UploadedFile[Any]] = {}
    for n, file in enumerate(files, start=1):
        name = file.name or _("photo")
        by_path[name if name not in by_path else f"{n} {name}"] = file
    for row in add_to_manifest(batch, [Entry(path, file.size or 0) for path, file in by_path.items()]):
        if row.state == ImportFile.State.WANTED:
            store_photo(row, by_path[row.path].chunks())
    close_import(batch)


def keep_blobs(owner_id: UUID, received: Sequence[Received]) -> list[Blob]:
    """Name received bytes by their hash and write their rows; the same bytes give the same blob."""
    blobs = [Blob.named(owner_id, item.sha256, item.size) for item in received]
    with transaction.atomic(savepoint=False):
        rows = {blob.pk: blob for blob in blobs}.values()
        Blob.objects.bulk_create(rows, update_conflicts=True, unique_fields=["id"], update_fields=["created"])
        for item, blob in zip(received, blobs, strict=True):
            default_storage.adopt(item.path, blob.original_name)  # type: ignore[attr-defined]
    return blobs


def put_chunk(batch: Import, number: int, chunks: Iterable[bytes], *, sha256: str) -> None:
    """Take one chunk of a zip, whole or not at all; a chunk that is here already is left as it is."""
    _require_open(batch)
    if not 0 <= number < batch.archive_chunks:
        raise UploadError(
            _("Chunk %(n)d does not exist: this zip has %(all)d.") % {"n": number, "all": batch.archive_chunks}
        )
    if default_storage.exists(batch.chunk_name(number)):
        return
    last = number == batch.archive_chunks - 1
    expected = batch.archive_size - number * settings.ZIP_CHUNK_BYTES if last else settings.ZIP_CHUNK_BYTES
    received = _receive_within(chunks, settings.ZIP_CHUNK_BYTES, near=batch.chunk_name(number))
    try:
        if received.size != expected or (sha256 and received.sha256 != sha256):
            raise UploadError(_("Chunk %(n)d arrived damaged; it will be sent again.") % {"n": number}, status=422)
        default_storage.adopt(received.path, batch.chunk_name(number))  # type: ignore[attr-defined]
    finally:
        received.path.unlink(missing_ok=True)


def missing_chunks(batch: Import) -> list[int]:
    """The chunks of the zip that are still to come."""
    return [n for n in range(batch.archive_chunks) if not default_storage.exists(batch.chunk_name(n))]


def close_import(batch: Import) -> None:
    """All has been sent (or given up): what never came is named, and the rest is taken in to its end."""
    if missing := missing_chunks(batch):
        raise UploadError(
            ngettext(
                "%(n)d chunk of the zip has not arrived.", "%(n)d chunks of the zip have not arrived.", len(missing)
            )
            % {"n": len(missing)},
            status=409,
        )
    with transaction.atomic():
        if not Import.objects.filter(pk=batch.pk, state=Import.State.OPEN).update(state=Import.State.CLOSED):
            return
        batch.files.filter(state=ImportFile.State.WANTED).update(
            state=ImportFile.State.SKIPPED, reason=_("It was not sent. Choose the folder again to send it.")
        )
        wake(batch.job_id)


def register_archived(
    claim: Claim, batch: Import, files: Sequence[ImportFile], blobs: dict[str, Blob], *, upto: int
) -> None:
    """Rows for zip entries whose blobs are stored (by path), and how far the zip has been read."""
    with fenced(claim):
        known = set(batch.files.filter(path__in=[f.path for f in files]).values_list("path", flat=True))
        for file in files:
            if blob := blobs.get(file.path):
                file.blob, file.sha256, file.state = blob, blob.sha256, ImportFile.State.STORED
        ImportFile.objects.bulk_create([f for f in files if f.path not in known])
        Import.objects.filter(pk=batch.pk).update(archive_next=upto)


def judge_entry(batch: Import, entry: Entry) -> ImportFile:
    """The row of a zip entry before its bytes are read: wanted, or left out with the reason."""
    return _judge(batch, entry, None)


def place_photos(claim: Claim, batch: Import, outcomes: Sequence[Outcome]) -> list[Photo]:
    """Write what a worker found, in one fenced transaction: photos in their categories, refusals with their reasons.

    Returns:
        The photos that these files stand for, new ones and those that were in their place before.
    """
    with fenced(claim):
        good = [o for o in outcomes if not o.refusal]
        _update_blobs(outcomes)
        categories = _categories_for(batch, [clean_path(o.file.path) for o in good])
        placed = _find_or_create_photos(batch, good, categories)
        for outcome in outcomes:
            _settle(outcome, placed.get(outcome.file.pk))
        _write_back(ImportFile, [o.file for o in outcomes], ["state", "reason", "photo"])
        counts = batch.counts()
        settled = sum(counts[s] for s in ("accepted", "duplicate", "refused", "skipped"))
        Job.objects.filter(pk=claim.job_id).update(done=settled, total=sum(counts.values()))
        record(claim.job_id, "photos", counts=counts, notices=batch.notices)
    return [photo for photo, _is_new in placed.values()]


def finish_import(claim: Claim, batch: Import) -> dict[str, Any]:
    """Close the books of an import whose files are all settled; returns its report."""
    batch.notices = _merged_folders(batch)
    batch.state = Import.State.DONE
    with fenced(claim):
        batch.save(update_fields=["notices", "state"])
    return batch.report()


def clean_path(path: str) -> str:
    """A path as a person reads it: one Unicode form, forward slashes, no empty, dot or overlong parts."""
    path = unicodedata.normalize("NFC", path.replace("\\", "/"))
    parts = ["".join(c for c in p if c.isprintable()).strip()[:255] for p in path.split("/")]
    parts = [p for p in parts if p not in ("", ".", "..")]
    return "/".join([*parts[:-1][:MAX_DEPTH], *parts[-1:]])[:1000]


def _receive_within(chunks: Iterable[bytes], limit: int, *, near: str) -> Received:
    def bounded() -> Iterable[bytes]:
        total = 0
        for chunk in chunks:
            total += len(chunk)
            if total > limit:
                raise UploadError(
                    _("This file is larger than %(mb)d MB, the most that is taken.") % {"mb": limit // 1024**2},
                    status=413,
                )
            yield chunk

    folder = Path(default_storage.path(near)).parent
    path = default_storage.temporary(folder)  # type: ignore[attr-defined]
    try:
        return receive(bounded(), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _owner_folder(batch: Import) -> str:
    return f"incoming/{batch.collection.owner_id}/file"


def _require_open(batch: Import) -> None:
    if batch.state != Import.State.OPEN:
        raise UploadError(_("This upload is finished. Start another one to add photos."), status=409)


def _without_repeats(entries: Sequence[Entry]) -> list[Entry]:
    """Each path once; what has no name at all is dropped."""
    named: dict[str, Entry] = {}
    for entry in entries:
        path = entry.path.replace("\0", "")[:1000]
        if clean_path(path):
            named.setdefault(path, Entry(path, entry.size, entry.sha256))
    return list(named.values())


def _judge(batch: Import, entry: Entry, blob: Blob | None) -> ImportFile:
    file = ImportFile(batch=batch, path=entry.path, size=entry.size, sha256=entry.sha256)
    name = PurePosixPath(entry.path).name
    ending = name.rpartition(".")[2].lower() if "." in name else ""
    if name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini") or "__MACOSX" in entry.path:
        file.state, file.reason = ImportFile.State.SKIPPED, _("A system file, no photo.")
    elif ending not in PHOTO_ENDINGS:
        file.state = ImportFile.State.SKIPPED
        file.reason = _("No photo by its name: .%(ending)s is not a picture format that is known here.") % {
            "ending": ending or "?"
        }
    elif entry.size == 0:
        file.state, file.reason = ImportFile.State.REFUSED, _("It is empty: 0 bytes.")
    elif entry.size > settings.MAX_PHOTO_BYTES:
        file.state = ImportFile.State.REFUSED
        file.reason = _("It has %(mb).0f MB; at most %(limit)d MB are taken.") % {
            "mb": entry.size / 1024**2,
            "limit": settings.MAX_PHOTO_BYTES // 1024**2,
        }
    elif blob is not None and blob.state == Blob.State.REFUSED:
        file.state, file.reason, file.blob = ImportFile.State.REFUSED, blob.reason, blob
    elif blob is not None:
        file.state, file.blob = ImportFile.State.STORED, blob
    return file


def _update_blobs(outcomes: Sequence[Outcome]) -> None:
    changed: dict[UUID, Blob] = {}  # two files of the same bytes share one, and PostgreSQL takes a row once
    for outcome in outcomes:
        blob = outcome.file.blob
        if blob is None or blob.state != Blob.State.STORED:
            continue
        blob.state = Blob.State.REFUSED if outcome.refusal else Blob.State.READY
        blob.reason = outcome.refusal[:300]
        blob.notes, blob.format = list(outcome.notes), outcome.format
        blob.width, blob.height, blob.captured_at = outcome.width, outcome.height, outcome.captured_at
        changed[blob.pk] = blob
    _write_back(Blob, list(changed.values()), ["state", "reason", "notes", "format", "width", "height", "captured_at"])


def _write_back(model: type[Blob] | type[ImportFile], rows: Sequence[Any], fields: list[str]) -> None:
    """As `bulk_update`, but as an upsert: its CASE expressions were two thirds of the calls that an import makes."""
    model._default_manager.bulk_create(rows, update_conflicts=True, unique_fields=["id"], update_fields=fields)


def _categories_for(batch: Import, paths: Sequence[str]) -> dict[str, Category]:
    """The category of each folder among the paths, made where it is missing, parents first."""
    folders = sorted({folder for path in paths for folder in _with_parents(path)}, key=lambda f: f.count("/"))
    found = {c.key: c for c in batch.collection.categories.filter(key__in=[Category.key_of(f) for f in folders])}
    for folder in folders:
        key = Category.key_of(folder)
        if key not in found:
            parent = found.get(Category.key_of(folder.rpartition("/")[0]))
            name = folder.rpartition("/")[2]
            path = f"{parent.path}/{name}" if parent else name
            found[key] = Category.objects.create(
                collection=batch.collection, parent=parent, name=name, path=path[:1000], key=key
            )
    return {folder: found[Category.key_of(folder)] for folder in folders}


def _with_parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: n + 1]) for n in range(len(parts))]


def _find_or_create_photos(
    batch: Import, outcomes: Sequence[Outcome], categories: dict[str, Category]
) -> dict[int, tuple[Photo, bool]]:
    """The photo of each file (by the file's id) and whether it is new."""
    collection = batch.collection
    here = Photo.objects.filter(collection=collection, blob__in=[o.file.blob_id for o in outcomes])
    there: dict[tuple[UUID | None, int | None], Photo] = {(p.blob_id, p.category_id): p for p in here}
    serial = Photo.objects.filter(collection=collection).aggregate(last=Max("serial"))["last"] or 0
    placed: dict[int, tuple[Photo, bool]] = {}
    fresh = []
    for outcome in outcomes:
        folder, _slash, name = clean_path(outcome.file.path).rpartition("/")
        category = categories.get(folder)
        place = (outcome.file.blob_id, category.pk if category else None)
        is_new = place not in there
        if is_new:
            serial += 1
            there[place] = Photo(
                blob=outcome.file.blob, collection=collection, category=category, name=name[:255], serial=serial
            )
            fresh.append(there[place])
        placed[outcome.file.pk] = (there[place], is_new)
    Photo.objects.bulk_create(fresh)
    return placed


def _settle(outcome: Outcome, placed: tuple[Photo, bool] | None) -> None:
    file = outcome.file
    if placed is None:
        file.state, file.reason = ImportFile.State.REFUSED, outcome.refusal[:300]
        return
    file.photo, is_new = placed
    if is_new:
        file.state, file.reason = ImportFile.State.ACCEPTED, "; ".join(outcome.notes)[:300]
    else:
        file.state = ImportFile.State.DUPLICATE
        file.reason = _("The same photo is here already, as “%(name)s”.") % {"name": file.photo.name}


def _merged_folders(batch: Import) -> list[str]:
    """A sentence for each category that several folders became, since they differ in case or Unicode form alone."""
    spellings: dict[str, Counter[str]] = {}
    taken = (ImportFile.State.ACCEPTED, ImportFile.State.DUPLICATE)
    for path in batch.files.filter(state__in=taken).values_list("path", flat=True):
        key = Category.key_of(clean_path(path).rpartition("/")[0])
        spellings.setdefault(key, Counter())[path.replace("\\", "/").rpartition("/")[0]] += 1
    return [
        _(
            "%(n)d folders whose names differ only in case or in the form of their characters became one category: "
            "%(folders)s. If they are different things, rename one and upload it again."
        )
        % {"n": len(folders), "folders": ", ".join(f"“{name}” ({count})" for name, count in folders.items())}
        for key, folders in spellings.items()
        if key and len(folders) > 1
    ][:50]
