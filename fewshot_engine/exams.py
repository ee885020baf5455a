"""Which photos a run learns from, and the episodes of held-out classes that it is examined on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.datasets import EpisodePlan, TrainData, check_episode, count_photos, one_class_per_group
from fewshot_engine.errors import DataError
from fewshot_engine.evaluation import Score, episode_accuracies
from fewshot_engine.prototypes import Rule

EVALUATION_PHOTOS = 100  # a class at most: more photos of a class cost time and hardly narrow the interval
EVALUATION_SEED = 1_000_003  # keeps the episodes of evaluation apart from those of training


class Exam:
    """Episodes of held-out classes that every score is made on: the same ones, so that scores compare in pairs."""

    def __init__(
        self,
        config: TrainConfig,
        data: TrainData,
        classes: tuple[int, ...],
        *,
        name: str = "validation",
        seed: int = 0,
        repeats_base: bool = False,
    ) -> None:
        """`name` is for sentences; another `seed` draws other episodes; scores are optimistic if it `repeats_base`."""
        labels = _thinned(labels_of(data, classes), config.seed)
        counts = {data.classes[index]: 0 for index in classes}
        found = count_photos(data.classes, *_only(labels, data.groups))
        counts |= {class_name: count for class_name, count in found.items() if class_name in counts}
        large = sum(count > config.episode.shot for count in counts.values())
        if large < 2:
            raise DataError(
                f"{name} needs 2 classes with at least {config.episode.shot + 1} photos; it has {large} of "
                f"{len(counts)} held out"
            )
        way = min(config.episode.way, large)
        self.plan = check_episode(counts, replace(config.episode, way=way))
        self.notes = tuple(f"{name.capitalize()}: {note}" for note in self.plan.notes)
        self.optimistic = repeats_base
        self.seed, self.episodes = config.seed + EVALUATION_SEED + seed, config.eval_episodes
        self.rule = Rule.usual(is_full=config.kind == "full")
        self.photos = torch.from_numpy(np.flatnonzero(labels >= 0))
        self.labels, self.groups = _only(labels, data.groups)

    def accuracies(self, embed: Callable[[Tensor], Tensor]) -> NDArray[np.float64]:
        """(episodes,)."""
        return episode_accuracies(
            embed(self.photos),
            self.labels,
            self.plan,
            episodes=self.episodes,
            seed=self.seed,
            groups=self.groups,
            rule=self.rule,
        )

    def score(self, accuracies: NDArray[np.float64]) -> Score:
        return Score.of(accuracies, self.plan, optimistic=self.optimistic)


def plan_for(data: TrainData, classes: tuple[int, ...], episode: EpisodeConfig, turns: int) -> EpisodePlan:
    """What episodes of these classes can be, each of which counts `turns` times."""
    counts = data.counts()
    needed = replace(episode, way=max(2, math.ceil(episode.way / turns)))
    plan = check_episode({data.classes[index]: counts[data.classes[index]] for index in classes}, needed)
    return replace(plan, way=episode.way)


def with_turns(
    labels: NDArray[np.int64], groups: NDArray[np.int64] | None, n_classes: int, turns: int
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Labels and groups of each photo, then of each photo turned once, twice, three times, as classes of their own."""
    shifts = np.repeat(np.arange(turns, dtype=np.int64), len(labels))
    repeated = np.tile(labels, turns)
    turned = np.where(repeated >= 0, repeated + n_classes * shifts, -1)
    if groups is None:
        return turned, None
    return turned, np.tile(groups, turns) + (int(groups.max()) + 1) * shifts


def labels_of(data: TrainData, classes: tuple[int, ...]) -> NDArray[np.int64]:
    """(n,): the labels of these classes' photos, -1 for all others and for what a group keeps in another class."""
    labels = np.where(np.isin(data.labels, classes), data.labels, -1)
    if data.groups is not None:
        labels[~one_class_per_group(data.labels, data.groups)] = -1
    return labels.astype(np.int64)


def _thinned(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """At most EVALUATION_PHOTOS of each class, at random; the others become -1."""
    labels = labels.copy()
    random = np.random.default_rng(seed)
    for name in np.unique(labels[labels >= 0]):
        members = np.flatnonzero(labels == name)
        if len(members) > EVALUATION_PHOTOS:
            labels[random.permutation(members)[EVALUATION_PHOTOS:]] = -1
    return labels


def _only(
    labels: NDArray[np.int64], groups: NDArray[np.int64] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    kept = labels >= 0
    return labels[kept], None if groups is None else groups[kept]
