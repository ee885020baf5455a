"""Near copies among photos, found by their pixels: other sizes and encodings of one picture, frames of a burst.

Each photo is compared at a small scale; importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.datasets import LabelledImages
from fewshot_engine.errors import ImageRefused

THUMBNAIL = 20  # pixels, of the side
NEAR = 0.2  # between thumbnails of mean 0 and length 1; see `near_copies`
LEAST_CONTRAST = 4.0  # grey levels of 256: with less, noise is all there is to compare
NOMINATING_AXES = 8  # more separate hardly better, and slow the search tree down


def group_near_copies(images: LabelledImages, *, decode_workers: int = 2) -> LabelledImages:
    """The same photos, in groups that hold near copies as well: other sizes and encodings of one picture.

    Reads every photo once, at a small scale. A photo that cannot be read stays as it is.
    """
    small = thumbnails(images.paths, decode_workers=decode_workers)
    return replace(images, groups=near_copies(small, images.groups))


def thumbnails(paths: Sequence[str | Path], *, decode_workers: int = 2) -> NDArray[np.uint8]:
    """(n, THUMBNAIL, THUMBNAIL, 3): whole photos, squeezed into the square; black where one cannot be read."""
    from PIL.Image import Resampling

    from fewshot_engine import images

    def small(path: str | Path) -> NDArray[np.uint8]:
        try:
            rgb = images.decode(Path(path), min_side=2 * THUMBNAIL).rgb
        except (ImageRefused, OSError):
            return np.zeros((THUMBNAIL, THUMBNAIL, 3), dtype=np.uint8)
        return np.asarray(rgb.resize((THUMBNAIL, THUMBNAIL), Resampling.BOX))

    with ThreadPoolExecutor(max(1, decode_workers)) as pool:
        return np.stack(list(pool.map(small, paths)))


def near_copies(small: NDArray[np.uint8], groups: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Groups of photos whose pixels differ by at most a fifth of their contrast, whatever their brightness.

    Re-encoding, resizing and brightening stay under 0.1; the two most alike of 2,700 drawings of characters are 0.3
    apart, of 200 photos of clothes 0.4. A burst's frames join where nothing moved far. All pairs that close are found:
    they are as close in their first principal components, so a search tree over those nominates a few, and their
    pixels decide.

    Args:
        small: (n, s, s, 3) uint8, of `thumbnails`; one without contrast is like nothing.
        groups: (n,) groups that are known already, and stay together.

    Returns:
        (n,), group numbers from 0.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    n = len(small)
    rows = small.reshape(n, -1).astype(np.float32)
    rows -= rows.mean(axis=1, keepdims=True)
    plain = rows.std(axis=1) < LEAST_CONTRAST
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.float32(1e-6))
    candidates = np.flatnonzero(~plain)
    pairs = np.zeros((0, 2), dtype=np.int64)
    if len(candidates):
        unit = rows[candidates]
        _, axes = np.linalg.eigh(unit.T @ unit)  # ascending
        nominated = cKDTree(unit @ axes[:, -NOMINATING_AXES:]).query_pairs(NEAR + 1e-6, output_type="ndarray")
        kept = [
            part[np.linalg.norm(unit[part[:, 0]] - unit[part[:, 1]], axis=1) <= NEAR]
            for part in np.array_split(nominated, len(nominated) // 10_000 + 1)
        ]
        pairs = candidates[np.concatenate(kept)]
    if groups is not None:  # each photo with the first of its group
        _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
        pairs = np.concatenate([pairs, np.stack([np.arange(n), first[inverse]], axis=1)])
    links = coo_array((np.ones(len(pairs), dtype=np.int8), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    numbers: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
    return numbers
