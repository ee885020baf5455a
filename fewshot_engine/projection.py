"""Maps: embeddings as points on a plane, like beside like. For looking at, never for measuring.

PCA is there at once; UMAP (McInnes et al. 2018) and t-SNE (van der Maaten and Hinton 2008) take longer and keep
neighbourhoods. All of them work on L2-normalised embeddings, in which near means a large cosine, as it does for the
classifier. The libraries are imported where they are used: each takes seconds to load.
"""

from __future__ import annotations

import warnings
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import ConfigError
from fewshot_engine.prototypes import FloatArray, l2_normalise

Float32Array = npt.NDArray[np.float32]
Method = Literal["pca", "umap", "tsne"]

REDUCED = 50  # dimensions in which neighbours are looked for
NEIGHBOURS = 15  # of UMAP
PERPLEXITY = 30.0  # of t-SNE
FEWEST = 5  # points; with less, neighbourhoods say nothing and PCA draws the map


def project(embeddings: FloatArray, method: Method = "pca", *, seed: int = 0) -> Float32Array:
    """A map of the embeddings; the same for the same seed, on one machine.

    Args:
        embeddings: (n, dim), of any length; n may be 0, and with fewer than 5 points every method is PCA.
        method: "pca", "umap" or "tsne". UMAP compiles itself at its first use in a process, which takes about 40 s on
            two cores: tell whoever waits.

    Returns:
        (n, 2) in [-1, 1], centred, with the aspect ratio kept: the wider direction fills the range.

    Raises:
        ConfigError: another method.
        ValueError: not (n, dim), or an embedding is not finite.
    """
    if method not in get_args(Method):
        raise ConfigError(f"method is {method!r}: it is pca, umap or tsne")
    reduced = pca(embeddings, dim=2 if method == "pca" else REDUCED, seed=seed)
    if method == "pca" or len(reduced) < FEWEST or not reduced.any():
        return _framed(reduced[:, :2])
    return _framed(umap(reduced, seed=seed) if method == "umap" else tsne(reduced, seed=seed))


def pca(embeddings: FloatArray, *, dim: int = 2, seed: int = 0) -> Float32Array:
    """Principal components of the L2-normalised embeddings, largest first.

    The solver is randomised where that is faster (Halko et al. 2011); signs are settled by the largest entries.

    Returns:
        (n, dim); columns beyond what n points span are 0.
    """
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings have shape {embeddings.shape}: they must be (n, dim), and finite")
    n = len(embeddings)
    spanned = min(dim, n - 1, embeddings.shape[1])
    components = np.zeros((n, dim), dtype=np.float32)
    rows = l2_normalise(np.asarray(embeddings, dtype=np.float32))
    if spanned > 0 and np.ptp(rows, axis=0).any():
        from sklearn.decomposition import PCA

        components[:, :spanned] = PCA(spanned, random_state=seed).fit_transform(rows)
    return components


def umap(reduced: Float32Array, *, seed: int = 0) -> Float32Array:
    """UMAP, begun at the first two principal components, which keeps its large shapes meaningful (Kobak and Linderman
    2021). A fixed seed keeps it to one core, and the first call in a process compiles for about 40 s.

    Args:
        reduced: (n, d), principal components from `pca`; n at least 5.

    Returns:
        (n, 2), in units of its own.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # of a part that would need TensorFlow
        from umap import UMAP

    start = 10 * _framed(reduced[:, :2])
    mapper = UMAP(n_neighbors=min(NEIGHBOURS, len(reduced) - 1), init=start, random_state=seed, n_jobs=1)
    points: Float32Array = mapper.fit_transform(reduced)
    return points


def tsne(reduced: Float32Array, *, seed: int = 0) -> Float32Array:
    """t-SNE, begun at the first two principal components (Kobak and Berens 2019).

    Args:
        reduced: (n, d), principal components from `pca`; n at least 5. Below 91 points the perplexity of 30 shrinks to
            a third of the others.

    Returns:
        (n, 2), in units of its own.
    """
    from openTSNE import TSNE

    perplexity = min(PERPLEXITY, (len(reduced) - 1) / 3)
    start = 1e-4 * _framed(reduced[:, :2])
    # One thread: several wait for each other by spinning, and beside a training that took 15 times as long.
    points = TSNE(perplexity=perplexity, initialization=start, random_state=seed, n_jobs=1).fit(reduced)
    return np.asarray(points, dtype=np.float32)


def _framed(points: FloatArray) -> Float32Array:
    """The middle of their box moved to 0, both directions scaled alike to fit [-1, 1]."""
    if not len(points):
        return np.zeros((0, 2), dtype=np.float32)
    low, high = points.min(axis=0), points.max(axis=0)
    reach = float((high - low).max()) / 2
    framed: Float32Array = ((points - (low + high) / 2) / (reach or 1)).astype(np.float32)
    return np.clip(framed, -1, 1)
