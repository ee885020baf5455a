"""Rows of the site <-> arrays of the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.checkpoints import write_atomically

FILE = "photos.json"


@dataclass(frozen=True, eq=False)
class FrozenPhotos:
    """The photos that a run learns from, as they were at its first attempt.

    Attributes:
        classes: class names, unique.
        blob_ids: n contents.
        labels: (n,) int64, indices into `classes`.
        groups: (n,) int64; photos of one content share a number.
    """

    classes: tuple[str, ...]
    blob_ids: tuple[UUID, ...]
    labels: NDArray[np.int64]

    @property
    def groups(self) -> NDArray[np.int64]:
        numbers = {blob_id: n for n, blob_id in enumerate(dict.fromkeys(self.blob_ids))}
        return np.array([numbers[blob_id] for blob_id in self.blob_ids], dtype=np.int64)

    @classmethod
    def of(cls, rows: Sequence[tuple[UUID, int]], names: Mapping[int, str]) -> FrozenPhotos:
        """From (blob, category) pairs and the names of the categories."""
        index = {pk: n for n, pk in enumerate(names)}
        labels = np.array([index[category] for _blob, category in rows], dtype=np.int64)
        return cls(tuple(names.values()), tuple(blob for blob, _category in rows), labels)

    @classmethod
    def load(cls, folder: Path) -> FrozenPhotos | None:
        try:
            stored = json.loads((folder / FILE).read_text())
        except FileNotFoundError:
            return None
        blob_ids = tuple(UUID(text) for text in stored["blobs"])
        return cls(tuple(stored["classes"]), blob_ids, np.array(stored["labels"], dtype=np.int64))

    def save(self, folder: Path) -> None:
        stored = {
            "classes": self.classes,
            "labels": self.labels.tolist(),
            "blobs": [str(blob_id) for blob_id in self.blob_ids],
        }
        write_atomically(folder / FILE, json.dumps(stored).encode())
