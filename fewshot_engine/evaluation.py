"""How well embeddings tell new classes apart: N-way K-shot accuracy of the nearest prototype (Snell et al. 2017)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.episodes import Episodes, EpisodeSampler
from fewshot_engine.errors import DataError

CHUNK_BYTES = 64 * 2**20  # of gathered embeddings at a time: stays near the cache, and small beside the model


@dataclass(frozen=True)
class Score:
    """Mean accuracy over episodes.

    Attributes:
        accuracy: in [0, 1]; chance is 1 / `way`.
        ci95: half the width of its 95 % interval, 1.96 x std / sqrt(episodes).
        optimistic: made on classes that were trained on, because there were too few to hold any out.
    """

    accuracy: float
    ci95: float
    episodes: int
    way: int
    shot: int
    query: int
    optimistic: bool = False

    @classmethod
    def of(cls, accuracies: NDArray[np.float64], plan: EpisodePlan, *, optimistic: bool = False) -> Score:
        """From the accuracy of each episode, (episodes,)."""
        n = len(accuracies)
        spread = float(accuracies.std(ddof=1)) if n > 1 else 0.0
        mean = float(accuracies.mean())
        return cls(mean, 1.96 * spread / n**0.5, n, plan.way, plan.shot, plan.query, optimistic)


@dataclass(frozen=True)
class Quality:
    """Cosine distances, in [0, 2], between L2-normalised embeddings.

    Attributes:
        intra_class: of a photo to the mean of its class, averaged over each class and then over the classes.
        inter_class: between the means of two classes, averaged over the pairs.
        ratio: intra / inter; the smaller, the easier to tell classes apart.
    """

    intra_class: float
    inter_class: float
    ratio: float


def evaluate(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    way: int,
    shot: int,
    query: int,
    episodes: int = 600,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> Score:
    """N-way K-shot accuracy of the prototype with the largest cosine.

    Args:
        embeddings: (n, dim), any length.
        labels: (n,) class indices; classes with fewer than shot + query photos are not drawn.
        groups: (n,); photos of one group are never on both sides of an episode.

    Raises:
        DataError: too few classes have shot + query photos.
    """
    plan = EpisodePlan(way, shot, query)
    return Score.of(episode_accuracies(embeddings, labels, plan, episodes=episodes, seed=seed, groups=groups), plan)


def episode_accuracies(
    embeddings: NDArray[np.float32] | Tensor,
    labels: NDArray[np.int64],
    plan: EpisodePlan,
    *,
    episodes: int,
    seed: int,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.float64]:
    """(episodes,), each in [0, 1]. The same seed, labels and groups give the same episodes, so two encoders pair up."""
    results = []
    for drawn, predicted in _predictions(embeddings, labels, plan, episodes=episodes, seed=seed, groups=groups):
        truth = torch.arange(plan.way).repeat_interleave(plan.query)
        results.append((predicted == truth).double().mean(dim=1))
        del drawn
    return torch.cat(results).numpy()


def confusion(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    n_classes: int,
    way: int,
    shot: int,
    query: int,
    episodes: int = 600,
    seed: int = 0,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """(n_classes, n_classes): how many query images of class i (row) were taken for class j, over the episodes."""
    counts = torch.zeros(n_classes * n_classes, dtype=torch.long)
    plan = EpisodePlan(way, shot, query)
    for drawn, predicted in _predictions(embeddings, labels, plan, episodes=episodes, seed=seed, groups=groups):
        truth = drawn.classes.repeat_interleave(query, dim=1)  # (b, way * query)
        taken_for = drawn.classes.gather(1, predicted)
        counts += torch.bincount((truth * n_classes + taken_for).flatten(), minlength=n_classes**2)
    return counts.view(n_classes, n_classes).numpy()


def quality(embeddings: NDArray[np.float32], labels: NDArray[np.int64]) -> Quality:
    """Distances within and between classes; needs two classes.

    Raises:
        DataError: fewer than two classes.
    """
    z = normalize(torch.as_tensor(embeddings, dtype=torch.float64), dim=1)
    names, index = torch.unique(torch.as_tensor(labels), return_inverse=True)
    if len(names) < 2:
        raise DataError(f"distances between classes need 2 classes; there are {len(names)}")
    sizes = torch.bincount(index).double()
    means = torch.zeros(len(names), z.shape[1], dtype=torch.float64).index_add_(0, index, z) / sizes[:, None]
    means = normalize(means, dim=1)  # (n_classes, dim)
    own = 1 - (z * means[index]).sum(dim=1)  # (n,)
    intra = float((torch.zeros(len(names), dtype=torch.float64).index_add_(0, index, own) / sizes).mean())
    pairs = torch.triu_indices(len(names), len(names), offset=1)
    inter = float((1 - means @ means.T)[pairs[0], pairs[1]].mean())
    return Quality(intra, inter, intra / inter if inter > 0 else float("inf"))


def _predictions(
    embeddings: NDArray[np.float32] | Tensor,
    labels: NDArray[np.int64],
    plan: EpisodePlan,
    *,
    episodes: int,
    seed: int,
    groups: NDArray[np.int64] | None,
) -> Iterator[tuple[Episodes, Tensor]]:
    """Batches of episodes, and for each query image the predicted place among the ways, (b, way * query)."""
    z = normalize(torch.as_tensor(embeddings).float(), dim=1).cpu()
    generator = torch.Generator().manual_seed(seed)
    sampler = EpisodeSampler(labels, episode=plan, generator=generator, groups=groups)
    drawn = sampler.sample(episodes)
    size = max(1, CHUNK_BYTES // (4 * z.shape[1] * plan.photos))
    for start in range(0, episodes, size):
        part = Episodes(*(t[start : start + size] for t in (drawn.classes, drawn.support, drawn.query)))
        prototypes = normalize(z[part.support].mean(dim=2), dim=2)  # (b, way, dim)
        queries = z[part.query].flatten(1, 2)  # (b, way * query, dim)
        yield part, torch.bmm(queries, prototypes.mT).argmax(dim=2)
