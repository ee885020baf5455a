"""What a training run reports as it goes, in the order in which it comes. See `training.meta_train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.evaluation import Score


@dataclass(frozen=True)
class Started:
    """The first report. `baseline` is the backbone before any training, on the episodes that every score uses.

    Where there are `test_classes`, the final figure comes from them; see `Finished`.
    """

    plan: EpisodePlan
    base_classes: tuple[str, ...]
    validation_classes: tuple[str, ...]
    chance: float
    baseline: Score
    resumed_at: int
    notes: tuple[str, ...]
    test_classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pretrained:
    """At most four a second, before the first episode; `accuracy` is among all base classes, of training photos."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    photos_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Step:
    """At most four a second; loss and accuracy are means over the training episodes since the last one."""

    epoch: int
    episode: int
    loss: float
    accuracy: float
    episodes_per_s: float
    seconds_left: float


@dataclass(frozen=True)
class Evaluated:
    """Accuracy on the validation classes; `loss` is the mean training loss since the evaluation before.

    Epoch 0 is what there is before the first episode: the closed form of *adapt*, pretrained weights, or the model that
    the run started from.
    """

    epoch: int
    episode: int
    loss: float
    score: Score
    best: bool


@dataclass(frozen=True)
class Saved:
    """From this checkpoint the run goes on exactly as if it had not been stopped."""

    path: Path
    episode: int


@dataclass(frozen=True)
class Finished:
    """`model` is a folder that `recipes.load_model` reads; `recommends` frozen where training did not help.

    Attributes:
        best: of the evaluations, on the validation classes; marked optimistic where no classes were left for a test.
        test: of the same checkpoint, on classes that were used for nothing else; None where there are none.
        baseline, test_baseline: of the backbone before any training, on the same episodes.
    """

    model: Path
    best: Score
    baseline: Score
    recommends: Literal["trained", "frozen"]
    notes: tuple[str, ...]
    test: Score | None = None
    test_baseline: Score | None = None

    @property
    def final(self) -> Score:
        """The figure to quote."""
        return self.test or self.best


Report = Started | Pretrained | Step | Evaluated | Saved | Finished
