"""How a run stands by its evaluations: which model it will end with, when to lower the rate or stop, what it gained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.evaluation import Score

COUNTERS = ("best_at", "since_best", "rate_drops", "since_drop")  # as a checkpoint keeps them


@dataclass
class Standing:
    """The best of a run's evaluations on the validation classes, and how long ago it was.

    Attributes:
        best: None before the first evaluation.
        best_at: the episode after which it was made.
        accuracies: (episodes,) of the best evaluation, to compare in pairs.
        state: what the learner was then; the finished model is made of it.
        since_best: evaluations.
        rate_drops: how often the learning rate was lowered, where its schedule is a plateau.
        since_drop: evaluations since the last of these, or since the best.
    """

    config: TrainConfig
    best: Score | None = None
    best_at: int = 0
    accuracies: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    state: dict[str, Tensor] = field(default_factory=dict)
    since_best: int = 0
    rate_drops: int = 0
    since_drop: int = 0

    @property
    def has_stalled(self) -> bool:
        """Is the patience at an end? Then the run stops early."""
        return 0 < self.config.patience <= self.since_best

    def take(
        self, score: Score, accuracies: NDArray[np.float64], *, episode: int, state: Callable[[], dict[str, Tensor]]
    ) -> bool:
        """Note an evaluation, and say whether it is the best so far; the learner's state is asked for only then.

        Those before the first episode try nobody's patience.
        """
        is_best = self.best is None or score.accuracy > self.best.accuracy
        if is_best:
            self.best, self.best_at, self.accuracies, self.state = score, episode, accuracies, state()
            self.since_best = self.since_drop = 0
        elif episode > 0:
            self.since_best += 1
            self.since_drop += 1
        if self.config.schedule == "plateau" and self.since_drop >= self.config.rate_patience:
            self.rate_drops += 1
            self.since_drop = 0
        return is_best

    def counters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTERS}

    def restore(
        self,
        best: Score | None,
        accuracies: NDArray[np.float64],
        state: dict[str, Tensor],
        counters: Mapping[str, Any],
    ) -> None:
        self.best, self.accuracies, self.state = best, accuracies, state
        for name in COUNTERS:
            setattr(self, name, int(counters[name]))


def verdict(gain: NDArray[np.float64], plan: EpisodePlan, *, where: str) -> str:
    """What training gained over the frozen backbone, in a sentence.

    Args:
        gain: (episodes,), of accuracy on the same episodes.
        where: whose episodes these are, "validation" or "test".
    """
    paired = Score.of(gain, plan)
    mean, margin = 100 * paired.accuracy, 100 * paired.ci95
    if mean > margin:
        return f"Training gained {mean:.1f} ± {margin:.1f} points on the {where} classes."
    if mean > 0:
        return f"The gain of {mean:.1f} ± {margin:.1f} points on the {where} classes is within the noise."
    return (
        f"Training gained nothing on the {where} classes ({mean:+.1f} ± {margin:.1f} points): keep the frozen backbone."
    )
