"""What a label set's examples say about it, when each is left out in turn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewshot_engine.leave_one_out import LeftOut

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelHealth:
    """What a label's examples say about it when each is left out in turn.

    Attributes:
        examples: how many there are.
        expected: share of them that the others would have recognised, 0 to 1; None below two different examples, or
            when there is no other label.
        confused_with: the label that takes most of those that were not recognised.
        outlier: row of the support set: the example least like the others, when another label would have it.
    """

    examples: int
    expected: float | None = None
    confused_with: int | None = None
    outlier: int | None = None


def expected_accuracy(by_rule: LeftOut) -> tuple[float | None, float | None]:
    """Leave-one-out hit rate, and half the width of Wilson's 95 % interval (Wilson 1927)."""
    n = int(by_rule.has_company.sum())
    if n == 0 or by_rule.similarities.shape[1] < 2:
        return None, None
    rate = float(by_rule.hits.sum()) / n
    z = 1.96
    return rate, z / (1 + z * z / n) * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))


def label_health(by_rule: LeftOut, asked: Labels, counts: npt.NDArray[np.int64]) -> tuple[LabelHealth, ...]:
    """Of labels with `counts` examples each, of which the rows `asked` were left out in turn."""
    answers = by_rule.similarities.argmax(axis=1)
    return tuple(_health_of(label, by_rule, answers, asked, counts) for label in range(len(counts)))


def _health_of(
    label: int, by_rule: LeftOut, answers: npt.NDArray[np.int64], asked: Labels, counts: npt.NDArray[np.int64]
) -> LabelHealth:
    n_way, examples = len(counts), int(counts[label])
    rows = np.flatnonzero((by_rule.labels == label) & by_rule.has_company)
    if len(rows) == 0 or n_way < 2:
        return LabelHealth(examples)
    missed = rows[answers[rows] != label]
    if len(missed) == 0:
        return LabelHealth(examples, expected=1.0)
    farthest = int(asked[missed[by_rule.similarities[missed, label].argmin()]])
    return LabelHealth(
        examples=examples,
        expected=1 - len(missed) / len(rows),
        confused_with=int(np.bincount(answers[missed], minlength=n_way).argmax()),
        outlier=farthest if len(rows) >= 3 else None,  # of two examples nobody can say which is the odd one
    )
