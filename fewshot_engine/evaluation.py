"""How well embeddings tell new classes apart: N-way K-shot episodes, answered as the product answers.

`episode_accuracies` is the fast one, many balanced episodes at a time, for training and grids. `report` draws every
episode as a label set of its own and asks `inference` what a person would be told: confidence, strangers and batches
included. On balanced, inductive episodes the two give the same answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_engine.datasets import EpisodePlan, count_photos
from fewshot_engine.episodes import Episodes, EpisodeSampler
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.inference import (
    Predictions,
    PrototypeModel,
    classify,
    classify_batch,
    fit,
    mean_embedding,
    neighbours_in,
)
from fewshot_engine.prototypes import Rule, cosine_prototypes, cosine_similarity, l2_normalise
from fewshot_engine.ridge import episode_cosines
from fewshot_engine.transductive import METHODS, Method

Mode = Literal["inductive", "pool", "batch"]

CHUNK_BYTES = 64 * 2**20  # of gathered embeddings at a time: stays near the cache, and small beside the model
CALIBRATION_BINS = 15
MOST_IN_GRAM = 8192  # photos; 256 MiB


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
        mean, ci95 = _mean_and_ci95(accuracies)
        return cls(mean, ci95, len(accuracies), plan.way, plan.shot, plan.query, optimistic)


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


@dataclass(frozen=True)
class Protocol:
    """What a report asks.

    Attributes:
        way, shot, query: of an episode; with `imbalance` the way x query query images are shared out unequally.
        mode: what each answer may look at. *inductive*: the examples. *pool*: also all photos, without their labels:
            their mean, and what is near each example. *batch*: also the other query images of the episode.
        imbalance: alpha of the Dirichlet distribution of the classes' shares (Veilleux et al. 2021 use 2); None for
            equal shares.
        method: of *batch*, see `transductive.METHODS`.
        rule: by which labels answer.
    """

    way: int
    shot: int
    query: int
    episodes: int = 600
    seed: int = 0
    mode: Mode = "inductive"
    imbalance: float | None = None
    method: Method = "ridge"
    rule: Rule = field(default_factory=Rule)

    def __post_init__(self) -> None:
        if self.episodes < 2:
            raise ConfigError(f"episodes is {self.episodes}: an interval needs 2, a figure to quote 600")
        if self.mode not in ("inductive", "pool", "batch"):
            raise ConfigError(f"mode is {self.mode!r}: it is inductive, pool or batch")
        if self.imbalance is not None and not 0 < self.imbalance <= 1000:
            raise ConfigError(f"imbalance is {self.imbalance}: the alpha of a Dirichlet distribution is above 0")
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}: it is one of {', '.join(METHODS)}")


@dataclass(frozen=True)
class Report:
    """What `report` found. Shares and probabilities are in [0, 1].

    Attributes:
        chance: 1 / way.
        inductive: accuracy on the same episodes of answers that look at the examples alone, for the other modes.
        changed: in *batch*, the share of answers that are others than without the batch.
        class_means: accuracy on the same episodes of the plain cosine to class means, uncentred.
        calibration_error: expected, of the confidences (Guo et al. 2017), 15 bins.
        stranger_auroc, stranger_auroc_ci95: of the stranger score, over open episodes: query images of `way` classes
            with examples and of as many without; None where there are too few classes.
        per_class: (n_classes,) accuracy on its query images; nan for a class that was in no episode.
        confusion: (n_classes, n_classes), how many query images of class i were taken for class j.
    """

    score: Score
    chance: float
    mode: Mode
    imbalance: float | None
    inductive: float | None
    changed: float | None
    class_means: float
    calibration_error: float
    stranger_auroc: float | None
    stranger_auroc_ci95: float | None
    quality: Quality
    per_class: NDArray[np.float64]
    confusion: NDArray[np.int64]

    def to_dict(self, classes: Sequence[str], *, worst: int = 10) -> dict[str, Any]:
        """For JSON; confusions are the `worst` pairs, as shares of the query images of their class."""
        shares = self.confusion / np.maximum(self.confusion.sum(axis=1, keepdims=True), 1)
        np.fill_diagonal(shares, 0)
        order = np.argsort(-shares, axis=None, kind="stable")[:worst]
        pairs = [divmod(int(place), len(classes)) for place in order if shares.flat[place] > 0]
        return {
            **{name: value for name, value in asdict(self.score).items() if name != "optimistic"},
            "chance": self.chance,
            "mode": self.mode,
            "imbalance": self.imbalance,
            "inductive": self.inductive,
            "changed": self.changed,
            "class_means": self.class_means,
            "calibration_error": self.calibration_error,
            "stranger_auroc": self.stranger_auroc,
            "stranger_auroc_ci95": self.stranger_auroc_ci95,
            **asdict(self.quality),
            "ratio": self.quality.ratio if np.isfinite(self.quality.ratio) else None,  # JSON has no infinity
            "per_class": {
                name: round(float(value), 4)
                for name, value in zip(classes, self.per_class, strict=True)
                if np.isfinite(value)
            },
            "confusions": [
                {"class": classes[i], "taken_for": classes[j], "share": round(float(shares[i, j]), 4)} for i, j in pairs
            ],
        }


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
    rule: Rule | None = None,
    likeness: NDArray[np.float32] | None = None,
) -> Score:
    """N-way K-shot accuracy, inductive, with as many query images of each class.

    Args:
        embeddings: (n, dim), any length.
        labels: (n,) class indices; classes with fewer than shot + query photos are not drawn.
        groups: (n,); photos of one group are never on both sides of an episode.
        rule, likeness: as for `episode_accuracies`.

    Raises:
        DataError: too few classes have shot + query photos.
    """
    plan = EpisodePlan(way, shot, query)
    accuracies = episode_accuracies(
        embeddings, labels, plan, episodes=episodes, seed=seed, groups=groups, rule=rule, likeness=likeness
    )
    return Score.of(accuracies, plan)


def episode_accuracies(
    embeddings: NDArray[np.float32] | Tensor,
    labels: NDArray[np.int64],
    plan: EpisodePlan,
    *,
    episodes: int,
    seed: int,
    groups: NDArray[np.int64] | None = None,
    rule: Rule | None = None,
    likeness: NDArray[np.float32] | None = None,
) -> NDArray[np.float64]:
    """(episodes,), each in [0, 1]. The same seed, labels and groups give the same episodes, so two encoders pair up.

    Args:
        rule: ridge prototypes, or the cosine to class means.
        likeness: (n, dim), what the classes that each photo resembles look like, see `Encoder.likeness`; for ridge
            prototypes alone.

    Raises:
        ConfigError: another rule.
        DataError: too few classes have shot + query photos.
    """
    rule = rule or Rule()
    if rule not in (Rule(), Rule("cosine", centred=False)):
        raise ConfigError(f"rule is {rule}: many episodes at a time go by ridge prototypes or by class means")
    z = normalize(torch.as_tensor(embeddings).float(), dim=1).cpu().numpy()
    drawn = _sampler(labels, plan, seed, groups).sample(episodes)
    truth = np.repeat(np.arange(plan.way), plan.query)
    size = max(1, CHUNK_BYTES // (4 * z.shape[1] * plan.photos))
    results = []
    for start in range(0, episodes, size):
        support, query = (part[start : start + size].numpy() for part in (drawn.support, drawn.query))
        examples, photos = z[support], z[query.reshape(len(query), -1)]
        if rule.metric == "ridge":
            cosines = episode_cosines(examples, photos, None if likeness is None else likeness[support])
        else:
            cosines = photos @ l2_normalise(examples.mean(axis=2)).swapaxes(1, 2)
        results.append((cosines.argmax(axis=2) == truth).mean(axis=1))
    return np.concatenate(results)


def report(
    embeddings: NDArray[np.float32],
    labels: NDArray[np.int64],
    protocol: Protocol,
    *,
    n_classes: int,
    groups: NDArray[np.int64] | None = None,
    likeness: NDArray[np.float32] | None = None,
) -> Report:
    """Everything that a label set of these photos would be told, over many episodes.

    Args:
        embeddings: (n, dim), any length.
        labels: (n,) in [0, n_classes); classes with fewer than shot + query photos are not drawn.
        groups: (n,); photos of one group are never on both sides of an episode.
        likeness: (n, dim), what the classes that each photo resembles look like, see `Encoder.likeness`.

    Raises:
        DataError: too few classes have shot + query photos.
    """
    photos = _Photos.of(embeddings, likeness, pooled=protocol.mode != "inductive")
    tally = _Tally(n_classes)
    for episode in _episodes(labels, protocol, groups):
        support, queries, lent = photos.of_episode(episode.support, episode.query)
        means = cosine_prototypes(support, episode.support_labels, protocol.way)
        tally.means.append(float((cosine_similarity(queries, means).argmax(axis=1) == episode.truth).mean()))
        if protocol.mode != "inductive":
            alone = fit(support, episode.support_labels, protocol.way, rule=protocol.rule, likeness=lent.by_classes)
            tally.inductive.append(float((classify(alone, queries, top_k=1).labels[:, 0] == episode.truth).mean()))
        model = _fit(support, episode.support_labels, protocol, lent)
        answers, changed = _answers(model, queries, protocol)
        tally.changed.append(float(changed.mean()))
        tally.add(episode, answers.labels[:, 0], answers.confidences[:, 0])
    plan = EpisodePlan(protocol.way, protocol.shot, protocol.query)
    aurocs = _stranger_aurocs(photos, labels, protocol, groups)
    auroc, auroc_ci95 = _mean_and_ci95(aurocs) if len(aurocs) else (None, None)
    confusion = tally.confusion()
    counted = confusion.sum(axis=1)
    return Report(
        score=Score.of(np.array(tally.accuracies), plan),
        chance=plan.chance,
        mode=protocol.mode,
        imbalance=protocol.imbalance,
        inductive=float(np.mean(tally.inductive)) if tally.inductive else None,
        changed=float(np.mean(tally.changed)) if protocol.mode == "batch" else None,
        class_means=float(np.mean(tally.means)),
        calibration_error=tally.calibration_error(),
        stranger_auroc=auroc,
        stranger_auroc_ci95=auroc_ci95,
        quality=quality(embeddings, labels),
        per_class=np.where(counted > 0, np.diagonal(confusion) / np.maximum(counted, 1), np.nan),
        confusion=confusion,
    )


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


def shared_out(shares: NDArray[np.float64], total: int, most: int) -> NDArray[np.int64]:
    """Whole numbers in these proportions that add up to `total`, none above `most`: largest remainders (Hamilton).

    What a class cannot give, because it has no more photos, the others do in proportion.

    Args:
        shares: (way,), at least 0 and not all 0; `total` is at most way x `most`.
    """
    wanted = np.zeros(len(shares))
    free = np.ones(len(shares), dtype=bool)
    while free.any():
        weights = np.maximum(shares[free], 1e-12)
        wanted[free] = (total - most * (~free).sum()) * weights / weights.sum()
        over = free & (wanted > most)
        if not over.any():
            break
        wanted[over] = most
        free &= ~over
    counts = np.floor(wanted + 1e-9).astype(np.int64)
    order = np.argsort(-np.where(counts < most, wanted - counts, -1), kind="stable")
    counts[order[: total - counts.sum()]] += 1
    return counts


@dataclass(frozen=True, eq=False)
class _Episode:
    """Indices of photos; `truth` says which of the ways each query image belongs to, `classes` which class that is."""

    classes: NDArray[np.int64]  # (way,)
    support: NDArray[np.int64]  # (way * shot,)
    support_labels: NDArray[np.int64]
    query: NDArray[np.int64]
    truth: NDArray[np.int64]


def _episodes(labels: NDArray[np.int64], protocol: Protocol, groups: NDArray[np.int64] | None) -> Iterator[_Episode]:
    plan = EpisodePlan(protocol.way, protocol.shot, protocol.query)
    support_labels = np.repeat(np.arange(plan.way), plan.shot)
    if protocol.imbalance is None:
        drawn = _sampler(labels, plan, protocol.seed, groups).sample(protocol.episodes)
        counts = np.full((protocol.episodes, plan.way), plan.query)
    else:
        most = _smallest_class(labels, plan, groups) - plan.shot
        wide = EpisodePlan(plan.way, plan.shot, most)
        drawn = _sampler(labels, wide, protocol.seed, groups).sample(protocol.episodes)
        rng = np.random.default_rng(protocol.seed)
        shares = rng.dirichlet(np.full(plan.way, protocol.imbalance), size=protocol.episodes)
        counts = np.array([shared_out(share, plan.way * plan.query, most) for share in shares])
    for classes, support, query, count in zip(*_arrays(drawn), counts, strict=True):
        chosen = np.arange(query.shape[1]) < count[:, None]  # (way, most)
        yield _Episode(classes, support.ravel(), support_labels, query[chosen], np.repeat(np.arange(plan.way), count))


@dataclass(frozen=True, eq=False)
class _Lent:
    """What `inference.fit` is told beside the examples: (n_support, dim) twice, and (dim,)."""

    by_classes: NDArray[np.float64] | None = None
    by_neighbours: NDArray[np.float64] | None = None
    centre: NDArray[np.float64] | None = None

    @property
    def likeness(self) -> NDArray[np.float64] | None:
        if self.by_classes is None or self.by_neighbours is None:
            return self.by_neighbours if self.by_classes is None else self.by_classes
        return self.by_classes + self.by_neighbours


@dataclass(frozen=True, eq=False)
class _Photos:
    """Embeddings, from which an episode's photos are taken in coordinates of their own span.

    Products of embeddings are all that answers depend on, so 75 photos of 3,840 numbers become 75 of 76.

    Attributes:
        n: how many photos there are.
        rows: (m, dim) float32: n rows of length 1; n of what the classes that they resemble look like, if that is
            known; and where photos are pooled, n of their neighbours' means and the mean of all, see
            `inference.neighbours_in`.
        knows_classes, is_pooled: which of these there are.
        gram: the products of the rows, where they fit into memory.
    """

    n: int
    rows: NDArray[np.float32]
    knows_classes: bool
    is_pooled: bool
    gram: NDArray[np.float32] | None

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], likeness: NDArray[np.float32] | None, *, pooled: bool) -> _Photos:
        photos = l2_normalise(embeddings).astype(np.float32)
        parts = [photos] if likeness is None else [photos, likeness]
        if pooled:
            centre = mean_embedding(photos)
            parts += [neighbours_in(photos, photos, centre), centre[None]]
        rows = np.concatenate(parts).astype(np.float32)
        gram = rows @ rows.T if len(rows) <= MOST_IN_GRAM else None
        return cls(len(photos), rows, likeness is not None, pooled, gram)

    def of_episode(
        self, support: NDArray[np.int64], query: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], _Lent]:
        """Support, query images, and what is known of the support beside."""
        parts = [support, query]
        if self.knows_classes:
            parts.append(support + self.n)
        if self.is_pooled:
            parts += [support + (1 + self.knows_classes) * self.n, np.array([len(self.rows) - 1])]
        rows = np.concatenate(parts)
        gram = self.rows[rows] @ self.rows[rows].T if self.gram is None else self.gram[np.ix_(rows, rows)]
        # Copies of a photo would make it singular: each gets a thousandth of its length in a direction of its own.
        coordinates = np.linalg.cholesky(gram.astype(np.float64) + 1e-6 * np.eye(len(rows)))
        examples, queries, *others = np.split(coordinates, np.cumsum([len(part) for part in parts])[:-1])
        by_classes = others.pop(0) if self.knows_classes else None
        by_neighbours, centre = (others[0], others[1][0]) if self.is_pooled else (None, None)
        return examples, queries, _Lent(by_classes, by_neighbours, centre)


def _fit(support: NDArray[np.float64], labels: NDArray[np.int64], protocol: Protocol, lent: _Lent) -> PrototypeModel:
    return fit(support, labels, protocol.way, rule=protocol.rule, centre=lent.centre, likeness=lent.likeness)


def _answers(
    model: PrototypeModel, queries: NDArray[np.float64], protocol: Protocol
) -> tuple[Predictions, NDArray[np.bool_]]:
    if protocol.mode == "batch":
        return classify_batch(model, queries, top_k=1, method=protocol.method)
    return classify(model, queries, top_k=1), np.zeros(len(queries), dtype=bool)


def _stranger_aurocs(
    photos: _Photos, labels: NDArray[np.int64], protocol: Protocol, groups: NDArray[np.int64] | None
) -> NDArray[np.float64]:
    """Of each open episode; empty where fewer than twice `way` classes are large enough."""
    from torchmetrics.functional.classification import binary_auroc  # seconds to import: not for training

    plan = EpisodePlan(2 * protocol.way, protocol.shot, protocol.query)
    try:
        drawn = _sampler(labels, plan, protocol.seed, groups).sample(protocol.episodes)
    except DataError:
        return np.empty(0)
    support_labels = np.repeat(np.arange(protocol.way), plan.shot)
    is_stranger = (torch.arange(plan.way * plan.query) >= protocol.way * plan.query).long()
    aurocs = []
    for _, support, query in zip(*_arrays(drawn), strict=True):
        examples, queries, lent = photos.of_episode(support[: protocol.way].ravel(), query.ravel())
        answers, _ = _answers(_fit(examples, support_labels, protocol, lent), queries, protocol)
        aurocs.append(float(binary_auroc(torch.from_numpy(answers.stranger), is_stranger, validate_args=False)))
    return np.array(aurocs)


class _Tally:
    """What the episodes of a report add up to."""

    def __init__(self, n_classes: int) -> None:
        self.n_classes = n_classes
        self.accuracies: list[float] = []
        self.inductive: list[float] = []
        self.changed: list[float] = []
        self.means: list[float] = []
        self._truth: list[NDArray[np.int64]] = []
        self._taken_for: list[NDArray[np.int64]] = []
        self._confidences: list[NDArray[np.float32]] = []

    def add(self, episode: _Episode, answers: NDArray[np.int64], confidences: NDArray[np.float32]) -> None:
        self.accuracies.append(float((answers == episode.truth).mean()))
        self._truth.append(episode.classes[episode.truth])
        self._taken_for.append(episode.classes[answers])
        self._confidences.append(confidences)

    def confusion(self) -> NDArray[np.int64]:
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        taken_for, truth = (torch.from_numpy(np.concatenate(part)) for part in (self._taken_for, self._truth))
        counts: NDArray[np.int64] = multiclass_confusion_matrix(taken_for, truth, self.n_classes).numpy()
        return counts

    def calibration_error(self) -> float:
        from torchmetrics.functional.classification import binary_calibration_error

        hits = np.concatenate(self._truth) == np.concatenate(self._taken_for)
        confidences = torch.from_numpy(np.concatenate(self._confidences)).clamp(0, 1)
        return float(binary_calibration_error(confidences, torch.from_numpy(hits).long(), n_bins=CALIBRATION_BINS))


def _mean_and_ci95(values: NDArray[np.float64]) -> tuple[float, float]:
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return float(values.mean()), 1.96 * spread / len(values) ** 0.5


def _sampler(
    labels: NDArray[np.int64], plan: EpisodePlan, seed: int, groups: NDArray[np.int64] | None
) -> EpisodeSampler:
    return EpisodeSampler(labels, episode=plan, generator=torch.Generator().manual_seed(seed), groups=groups)


def _smallest_class(labels: NDArray[np.int64], plan: EpisodePlan, groups: NDArray[np.int64] | None) -> int:
    """Photos of the smallest class that is large enough for the plan; the plan's own need where there is none."""
    need = plan.shot + plan.query
    sizes = count_photos([str(label) for label in range(int(labels.max()) + 1)], labels, groups).values()
    return min((size for size in sizes if size >= need), default=need)


def _arrays(drawn: Episodes) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    return drawn.classes.numpy(), drawn.support.numpy(), drawn.query.numpy()
