"""Embeddings, computed once and kept: float32 rows in shard files with one writer each; the database says where.

They are kept by backbone. An encoder that fuses several has no vectors of its own: those of its members are fused when
read, so that going from one encoder to another computes only what is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
from django.core.files.storage import default_storage
from numpy.typing import NDArray

from fewshot_engine.config import ENCODERS
from fewshot_engine.encoder import fuse
from webapp.library.models import Embedding, Shard

Vectors = NDArray[np.float32]
SHARD_ROWS = 8192
QUERY_IDS = 500  # ids a query; SQLite has a limit

_mine: dict[str, Shard] = {}  # the shard that this process writes, by backbone


@dataclass(frozen=True)
class Written:
    """Rows that are on the disk, and that no row of the database speaks of yet."""

    shard: Shard
    start: int
    blob_ids: tuple[UUID, ...]


def members(encoder: str) -> tuple[str, ...]:
    """The backbones that an encoder is made of; a single backbone, or a model of a run, is made of itself."""
    return ENCODERS.get(encoder, (encoder,))


def write(backbone: str, blob_ids: Sequence[UUID], vectors: Vectors) -> Written:
    """Append vectors (n, dim) of n blobs to this process's shard, flushed to the disk; `enter` makes them count."""
    shard = _mine.get(backbone)
    if shard is None or shard.rows + len(vectors) > SHARD_ROWS:
        if shard is not None:
            Shard.objects.filter(pk=shard.pk).update(sealed=True)
        shard = _mine[backbone] = Shard.objects.create(backbone=backbone, dim=vectors.shape[1])
    start = shard.rows
    path = Path(default_storage.path(shard.file_name))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("r+b" if path.exists() else "xb") as out:
        out.seek(start * shard.dim * 4)
        out.write(np.ascontiguousarray(vectors, dtype="<f4").tobytes())
        out.flush()
        os.fsync(out.fileno())
    shard.rows = start + len(vectors)
    return Written(shard, start, tuple(blob_ids))


def enter(written: Written) -> None:
    """The rows of what was written, inside the caller's transaction; a blob that has a vector keeps it."""
    Shard.objects.filter(pk=written.shard.pk).update(rows=written.start + len(written.blob_ids))
    Embedding.objects.bulk_create(
        [
            Embedding(blob_id=blob_id, backbone=written.shard.backbone, shard=written.shard, row=written.start + n)
            for n, blob_id in enumerate(written.blob_ids)
        ],
        ignore_conflicts=True,
    )


def missing(backbone: str, blob_ids: Iterable[UUID]) -> list[UUID]:
    """Those of the blobs that have no vector under a backbone yet, each once, in order."""
    wanted = list(dict.fromkeys(blob_ids))
    there: set[UUID] = set()
    for start in range(0, len(wanted), QUERY_IDS):
        ids = wanted[start : start + QUERY_IDS]
        there.update(Embedding.objects.filter(backbone=backbone, blob__in=ids).values_list("blob_id", flat=True))
    return [blob_id for blob_id in wanted if blob_id not in there]


def read(encoder: str, blob_ids: Sequence[UUID]) -> tuple[NDArray[np.bool_], Vectors]:
    """The vectors of blobs under an encoder, in their order; fused where it has several members.

    Returns:
        (n,) which of them have a vector (of every member), and (m, dim) those that there are; (0, 0) where there is
        none at all.
    """
    parts = [_read_member(backbone, blob_ids) for backbone in members(encoder)]
    if len(parts) == 1:
        return parts[0]
    everywhere = np.logical_and.reduce([there for there, _vectors in parts])
    if not everywhere.any():
        return everywhere, np.empty((0, 0), dtype=np.float32)
    return everywhere, fuse([found[everywhere[there]] for there, found in parts])


def _read_member(backbone: str, blob_ids: Sequence[UUID]) -> tuple[NDArray[np.bool_], Vectors]:
    places: dict[UUID, tuple[UUID, int]] = {}
    for start in range(0, len(blob_ids), QUERY_IDS):
        rows = Embedding.objects.filter(backbone=backbone, blob__in=blob_ids[start : start + QUERY_IDS])
        places.update({blob: (shard, row) for blob, shard, row in rows.values_list("blob_id", "shard_id", "row")})
    there = np.array([blob_id in places for blob_id in blob_ids], dtype=bool)
    found = [places[blob_id] for blob_id in blob_ids if blob_id in places]
    if not found:
        return there, np.empty((0, 0), dtype=np.float32)
    shards = Shard.objects.in_bulk({shard for shard, _row in found})
    vectors = np.empty((len(found), next(iter(shards.values())).dim), dtype=np.float32)
    for shard_id, shard in shards.items():
        here = [n for n, (owner, _row) in enumerate(found) if owner == shard_id]
        path = default_storage.path(shard.file_name)
        file = np.memmap(path, dtype="<f4", mode="r", shape=(shard.rows, shard.dim))
        vectors[here] = file[[found[n][1] for n in here]]
    return there, vectors
