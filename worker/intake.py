"""From stored bytes to photos with embeddings: decode safely, derive copies, embed in batches, write at once.

Decoding and embedding run in threads, one for each core (Pillow and ONNX Runtime let go of the interpreter), a chunk
ahead of what is being written down. A photo is decoded once, whatever the number of backbones that look at it.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC
from uuid import UUID

import numpy as np
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.utils.translation import gettext as _
from numpy.typing import NDArray
from PIL.Image import Image

from fewshot_engine import images
from fewshot_engine.encoder import Encoder
from fewshot_engine.errors import ImageRefused
from webapp.jobs.models import Job
from webapp.jobs.services import Claim, fenced, finish, report
from webapp.jobs.story import figure
from webapp.labelsets.models import Intake
from webapp.labelsets.services import photos_ready
from webapp.library.models import Blob, Import, ImportFile
from webapp.library.services import Outcome, finish_import, place_photos
from webapp.training.models import DEFAULT_ENCODER
from worker import archives, runtime, vectors
from worker.leases import Lease

CHUNK = 32
LINGER_S = 0.5
DECODED_SIDE = 1200  # px on the shorter side: enough for the working copy, and a large JPEG is decoded at a fraction

Pixels = NDArray[np.uint8]
Rows = dict[str, Pixels]  # by backbone: a photo as that takes it
Embeddings = list[tuple[str, list[UUID], Future[NDArray[np.float32]]]]  # a backbone, blobs, their vectors to come


@dataclass(frozen=True)
class Looked:
    """What decoding one file gave: its outcome, and a row for each backbone that has not seen it."""

    outcome: Outcome
    rows: Rows


def run(lease: Lease) -> None:
    """Take in all that an import has; a standing job until the import is closed."""
    batch = Import.objects.select_related("collection", "job").get(job_id=lease.claim.job_id)
    encoders = {name: runtime.encoder(name) for name in _backbones(batch)}
    with ThreadPoolExecutor(max_workers=runtime.CORES, thread_name_prefix="decode") as pool:
        if batch.state == Import.State.CLOSED and batch.archive_chunks:
            for _more in archives.take_in(lease, batch):
                _process_stored(lease, batch, encoders, pool)
        while _has_stored(batch):
            _process_stored(lease, batch, encoders, pool)
    _end(lease.claim, batch)


def embed_missing(claim: Claim, blobs: Sequence[Blob], encoder: str) -> None:
    """Embed what has no vector under an encoder yet (it was chosen, or trained, after the photos came), with progress.

    Where some of the encoder's members have seen a photo, only the others look at it.
    """
    wanted = _missing(vectors.members(encoder), [blob.pk for blob in blobs])
    todo = list({blob.pk: blob for blob in blobs if any(blob.pk in open_ids for open_ids in wanted.values())}.values())
    if not todo:
        return
    encoders = {backbone: runtime.encoder(backbone) for backbone, open_ids in wanted.items() if open_ids}
    with ThreadPoolExecutor(max_workers=runtime.CORES, thread_name_prefix="decode") as pool:
        for start in range(0, len(todo), CHUNK):
            chunk = todo[start : start + CHUNK]
            rows = pool.map(lambda blob: (blob.pk, _rows_of(blob, encoders, wanted)), chunk)
            written = _write(_embed(encoders, rows, pool))
            with fenced(claim):
                for part in written:
                    vectors.enter(part)
            done = start + len(chunk)
            report(
                claim,
                "preparing",
                changes={"message": _("Looking at the photos: %(n)d of %(all)d") % {"n": done, "all": len(todo)}},
                done=done,
                total=len(todo),
            )


def _backbones(batch: Import) -> list[str]:
    """Those of the default encoder, and those of the label set for which the photos were dropped."""
    names = list(vectors.members(DEFAULT_ENCODER))
    intake = Intake.objects.filter(batch=batch).select_related("label_set__model").first()
    if intake is not None:
        names += vectors.members(intake.label_set.model.backbone)
    return list(dict.fromkeys(names))


def _missing(backbones: Iterable[str], blob_ids: Collection[UUID]) -> dict[str, set[UUID]]:
    """Which of the blobs each backbone has not seen."""
    return {backbone: set(vectors.missing(backbone, blob_ids)) for backbone in backbones}


def _has_stored(batch: Import) -> bool:
    """Is there something to look at? While a folder is being sent, more comes at once, and sleeping costs a wake-up."""
    deadline = time.monotonic() + (LINGER_S if batch.job.queue == Job.Queue.INGEST else 0)
    while True:
        if batch.files.filter(state=ImportFile.State.STORED).exists():
            return True
        if batch.state != Import.State.OPEN or time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _process_stored(lease: Lease, batch: Import, encoders: dict[str, Encoder], pool: ThreadPoolExecutor) -> None:
    before: tuple[list[Outcome], Embeddings] | None = None
    for looked in _looked_at(batch, encoders, pool):
        embeddings = _embed(encoders, [(item.outcome.file.blob_id, item.rows) for item in looked], pool)
        if before is not None:
            _place(lease, batch, *before)
        if lease.is_lost:
            return
        before = [item.outcome for item in looked], embeddings
    if before is not None:
        _place(lease, batch, *before)


def _place(lease: Lease, batch: Import, outcomes: Sequence[Outcome], embeddings: Embeddings) -> None:
    written = _write(embeddings)
    with fenced(lease.claim):
        for part in written:
            vectors.enter(part)
        photos = place_photos(lease.claim, batch, outcomes)
        photos_ready(batch, photos, is_last=False)


def _looked_at(batch: Import, encoders: dict[str, Encoder], pool: ThreadPoolExecutor) -> Iterator[list[Looked]]:
    """The stored files chunk by chunk; the next chunk is being decoded while the caller works on this one."""
    after = 0
    ahead: list[Future[Looked]] = []
    while True:
        files = list(
            batch.files.filter(state=ImportFile.State.STORED, pk__gt=after)
            .select_related("blob")
            .order_by("pk")[:CHUNK]
        )
        wanted = _missing(encoders, [file.blob_id for file in files if file.blob_id])
        futures = [pool.submit(_look, file, encoders, wanted) for file in files]
        if ahead:
            yield [future.result() for future in ahead]
        if not files:
            return
        ahead, after = futures, files[-1].pk


def _look(file: ImportFile, encoders: dict[str, Encoder], wanted: dict[str, set[UUID]]) -> Looked:
    """Decode one stored file, keep its copies, and cut from it what backbones have not seen."""
    blob = file.blob
    if blob is None:
        return Looked(Outcome(file, refusal=_("Its bytes are gone; send it again.")), {})
    is_seen = not any(blob.pk in open_ids for open_ids in wanted.values())
    if blob.state == Blob.State.READY and is_seen:
        return Looked(Outcome(file), {})
    try:
        decoded = images.decode(default_storage.path(blob.original_name), min_side=DECODED_SIDE)
    except ImageRefused as refusal:
        return Looked(Outcome(file, refusal=str(refusal)), {})
    if blob.state == Blob.State.STORED:
        copies = images.derivatives(decoded.rgb)
        default_storage.save(blob.thumbnail_name, ContentFile(copies.thumbnail))
        default_storage.save(blob.working_name, ContentFile(copies.working))
    captured_at = decoded.captured_at.replace(tzinfo=UTC) if decoded.captured_at else None
    outcome = Outcome(file, "", decoded.format, decoded.width, decoded.height, decoded.notes, captured_at)
    return Looked(outcome, _cut(decoded.rgb, blob, encoders, wanted))


def _rows_of(blob: Blob, encoders: Mapping[str, Encoder], wanted: Mapping[str, set[UUID]]) -> Rows:
    decoded = images.decode(default_storage.path(blob.original_name), min_side=DECODED_SIDE)
    return _cut(decoded.rgb, blob, encoders, wanted)


def _cut(rgb: Image, blob: Blob, encoders: Mapping[str, Encoder], wanted: Mapping[str, set[UUID]]) -> Rows:
    return {name: encoder.prepare(rgb) for name, encoder in encoders.items() if blob.pk in wanted[name]}


def _embed(
    encoders: Mapping[str, Encoder], rows: Iterable[tuple[UUID | None, Rows]], pool: ThreadPoolExecutor
) -> Embeddings:
    """Push rows through their backbones, in as many parts as there are cores; of a photo that comes twice, one."""
    by_blob = {blob_id: found for blob_id, found in rows if blob_id is not None and found}
    embeddings = []
    for name, encoder in encoders.items():
        ids = [blob_id for blob_id, found in by_blob.items() if name in found]
        parts = [ids[start :: runtime.CORES] for start in range(min(runtime.CORES, len(ids)))]
        for part in parts:
            pixels = np.stack([by_blob[blob_id][name] for blob_id in part])
            embeddings.append((name, part, pool.submit(encoder.encode, pixels)))
    return embeddings


def _write(embeddings: Embeddings) -> list[vectors.Written]:
    """Put the vectors on the disk."""
    return [vectors.write(name, ids, future.result()) for name, ids, future in embeddings]


def _end(claim: Claim, batch: Import) -> None:
    batch.refresh_from_db(fields=["state"])
    if batch.state == Import.State.OPEN or batch.files.filter(state=ImportFile.State.STORED).exists():
        finish(claim, Job.State.IDLE)
        return
    with fenced(claim):
        final = finish_import(claim, batch)
        photos_ready(batch, [], is_last=True)
    archives.discard(batch)
    finish(claim, Job.State.SUCCEEDED, message=_summary(final["counts"]))


def _summary(counts: Mapping[str, int]) -> str:
    """ "1,296 accepted, 2 refused": what there was none of is not said."""
    words = {
        "accepted": _("%(n)s accepted"),
        "duplicate": _("%(n)s already there"),
        "refused": _("%(n)s refused"),
        "skipped": _("%(n)s left out"),
    }
    said = [text % {"n": figure(counts[name])} for name, text in words.items() if counts[name]]
    return ", ".join(said) or _("There was nothing to take in.")
