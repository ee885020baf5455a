"""Prototypes and distances: what a prototypical network (Snell et al. 2017) does once the embeddings are there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import ConfigError, EmptyClassError

FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Rule:
    """How a label set answers, once its photos are embeddings.

    Attributes:
        metric: the cosine to prototypes refined by ridge regression (`ridge.py`), the cosine to class means (Vinyals et
            al. 2016), or the squared Euclidean distance to class means (Snell et al. 2017); all of L2-normalised
            embeddings.
        centred: what the labels have in common is subtracted first, see `ridge.support_centre`; a centre that is given
            takes its place.
        prototypes: at most how many prototypes a class has, see `split_classes_in_groups`; 1 with ridge regression.
    """

    metric: Literal["ridge", "cosine", "euclidean"] = "ridge"
    centred: bool = True
    prototypes: int = 1

    def __post_init__(self) -> None:
        if self.metric not in ("ridge", "cosine", "euclidean"):
            raise ConfigError(f"metric is {self.metric!r}: it is ridge, cosine or euclidean")
        if not 1 <= self.prototypes <= 10:
            raise ConfigError(f"prototypes is {self.prototypes}: a class has 1 to 10")
        if self.metric == "ridge" and self.prototypes > 1:
            raise ConfigError(f"prototypes is {self.prototypes}: ridge regression makes one a class")

    @classmethod
    def usual(cls, *, is_full: bool) -> Rule:
        """What answers until something else is known to do better.

        A network that learned from pixels (*full*) was trained to be answered by the cosine to class means, and is:
        ridge prototypes cost it 2 points (Conv-4 on omniglot, 20 ways of 1 shot, 90.6 against 92.7). Everything else
        has ridge prototypes.
        """
        return cls("cosine", centred=False) if is_full else cls()


def compute_prototypes(embeddings: FloatArray, labels: IntArray, n_way: int) -> FloatArray:
    """Mean embedding of each class (Snell et al. 2017, eq. 1).

    Args:
        embeddings: (n_support, dim), any float type.
        labels: (n_support,), integers in [0, n_way).

    Returns:
        (n_way, dim), of the embeddings' type; row k is the prototype of class k.

    Raises:
        EmptyClassError: a class has no support example.
        ValueError: the shapes do not fit, or a label is out of range.
    """
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings {embeddings.shape} and labels {labels.shape} do not belong together")
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < n_way:
        raise ValueError(f"labels run from {labels.min()} to {labels.max()}: they must lie in 0 to {n_way - 1}")
    counts = np.bincount(labels, minlength=n_way)
    if (counts == 0).any():
        missing = int(np.flatnonzero(counts == 0)[0])
        raise EmptyClassError(f"label {missing} of {n_way} has no example, so it has no prototype")
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    sums = np.add.reduceat(embeddings[order], starts, axis=0)  # (n_way, dim), as no label is empty
    return sums / counts[:, None].astype(embeddings.dtype)


def one_hot(labels: IntArray, n_way: int, dtype: npt.DTypeLike = np.float32) -> FloatArray:
    """(n,) -> (n, n_way), a single 1 a row."""
    members: FloatArray = np.zeros((len(labels), n_way), dtype=dtype)
    members[np.arange(len(labels)), labels] = 1
    return members


def l2_normalise(vectors: FloatArray) -> FloatArray:
    """Each row divided by its Euclidean length; a row of zeros stays one, so that no NaN spreads from it."""
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(lengths > 1e-12, lengths, 1).astype(vectors.dtype)


def squared_euclidean(a: FloatArray, b: FloatArray) -> FloatArray:
    """Squared Euclidean distances, the Bregman divergence of Snell et al. 2017, section 2.3.

    Args:
        a: (n, dim).
        b: (m, dim).

    Returns:
        (n, m), never negative. By |a|² − 2ab + |b|²: exact to float precision of the squared lengths.
    """
    distances = (a * a).sum(1)[:, None] - 2 * (a @ b.T) + (b * b).sum(1)[None, :]
    clipped: FloatArray = np.maximum(distances, 0)
    return clipped


def cosine_similarity(a: FloatArray, b: FloatArray) -> FloatArray:
    """Cosines of the angles between rows (Vinyals et al. 2016); (n, dim), (m, dim) -> (n, m), within [-1, 1].

    A row of zeros has similarity 0 to everything.
    """
    return np.clip(l2_normalise(a) @ l2_normalise(b).T, -1, 1)


def cosine_prototypes(embeddings: FloatArray, labels: IntArray, n_way: int) -> FloatArray:
    """Prototypes for the cosine classifier: the mean of L2-normalised embeddings, normalised again; (n_way, dim).

    Raises: as `compute_prototypes`.
    """
    return l2_normalise(compute_prototypes(l2_normalise(embeddings), labels, n_way))


def split_classes_in_groups(
    embeddings: FloatArray, labels: IntArray, n_way: int, per_class: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Groups of examples for several prototypes a class: k-means within each, without chance.

    A class is split in as many groups as leave three examples for each on average, at most `per_class`. The first seed
    is the example nearest the class mean, each further one the example farthest from the seeds before it.

    Args:
        embeddings: (n, dim), L2-normalised.
        labels: (n,), integers in [0, n_way), none without an example.

    Returns:
        (n,) the group of each example, numbered class by class, and (n_groups,) the class of each group. No group is
        empty.
    """
    groups = np.zeros(len(labels), dtype=np.int64)
    class_of: list[int] = []
    for label in range(n_way):
        rows = np.flatnonzero(labels == label)
        own = _kmeans(embeddings[rows], max(1, min(per_class, len(rows) // 3)))
        found, own = np.unique(own, return_inverse=True)
        groups[rows] = len(class_of) + own
        class_of += [label] * len(found)
    return groups, np.array(class_of, dtype=np.int64)


def _kmeans(photos: FloatArray, k: int, *, iterations: int = 20) -> npt.NDArray[np.int64]:
    """(n, dim) -> (n,) in [0, k): spherical k-means (Dhillon and Modha 2001) from seeds far apart."""
    seeds = [int((photos @ photos.mean(axis=0)).argmax())]
    while len(seeds) < k:
        seeds.append(int((photos @ photos[seeds].T).max(axis=1).argmin()))
    centres = photos[seeds]
    nearest: npt.NDArray[np.int64] = (photos @ centres.T).argmax(axis=1)
    for _ in range(iterations):
        sums = one_hot(nearest, k, photos.dtype).T @ photos
        empty = np.bincount(nearest, minlength=k) == 0
        centres = np.where(empty[:, None], centres, l2_normalise(sums))
        before, nearest = nearest, (photos @ centres.T).argmax(axis=1)
        if (nearest == before).all():
            break
    return nearest
