"""Each example of a label set against the set as it would be without it: what calibration and choices are made on.

All of it follows from the examples' Gram matrix, exactly and without fitting again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewshot_engine.prototypes import FloatArray, Rule, one_hot, split_classes_in_groups
from fewshot_engine.ridge import RIDGE, left_out_cosines

Labels = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

NEAR_COPY = 0.98  # cosine above which two examples of a label count as one when either is left out


@dataclass(frozen=True)
class LeftOut:
    """Similarities of n examples to n_way labels, in the units of a cosine, -1 to 1.

    Attributes:
        labels: (n,).
        similarities: (n, n_way) to each label's best prototype, the example and its near copies left out; -1 to its own
            label where nothing is left of it.
        foreign: (n, n_way) the same with its whole label left out, as a stranger sees the set; -1 to that label.
        has_company: (n,) whether its label has another, different example.
    """

    labels: Labels
    similarities: Float64Array
    foreign: Float64Array
    has_company: npt.NDArray[np.bool_]

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        """(n,) whether the others would have recognised it; False without company."""
        recognised: npt.NDArray[np.bool_] = self.similarities.argmax(axis=1) == self.labels
        return recognised & self.has_company

    @property
    def across(self) -> float:
        """Mean similarity of an example to other labels; nan where there is one."""
        n, n_way = self.similarities.shape
        if n_way < 2:
            return float("nan")
        own = self.similarities[np.arange(n), self.labels].sum()
        across: float = (self.similarities.sum() - own) / (n * (n_way - 1))
        return across


def near_copies(photos: FloatArray, labels: Labels) -> npt.NDArray[np.bool_]:
    """(n, n): which examples say nothing new beside an example of their label; itself among them.

    Args:
        photos: (n, dim), L2-normalised and not centred, which would drive copies apart.
    """
    same = labels[:, None] == labels[None, :]
    copies: npt.NDArray[np.bool_] = (same & (photos @ photos.T > NEAR_COPY)) | np.eye(len(labels), dtype=bool)
    return copies


def leave_one_out(
    support: FloatArray, labels: Labels, n_way: int, rule: Rule, copies: npt.NDArray[np.bool_]
) -> LeftOut:
    """
    Args:
        support: (n, dim), rows of length 1, centred where the rule says so. The centre keeps what it had of an example
            that is left out; so do the groups of a rule with several prototypes.
        labels: (n,), integers in [0, n_way), none without an example.
        copies: (n, n), which examples are left out when example i is; see `near_copies`.
    """
    gram = (support @ support.T).astype(np.float64)
    if rule.metric == "ridge" and n_way > 1:
        similarities, foreign = left_out_cosines(gram, labels, n_way, copies), _ridge_foreign(gram, labels, n_way)
    else:
        groups, class_of = split_classes_in_groups(support, labels, n_way, rule.prototypes)
        similarities = _without_copies(gram, groups, class_of, copies, squared=rule.metric == "euclidean")
        foreign = similarities.copy()
    has_company = copies.sum(axis=1) < np.bincount(labels, minlength=n_way)[labels]
    rows = np.arange(len(labels))
    similarities[rows[~has_company], labels[~has_company]] = -1
    foreign[rows, labels] = -1
    return LeftOut(labels, np.clip(similarities, -1, 1), np.clip(foreign, -1, 1), has_company)


def _without_copies(
    gram: Float64Array, groups: Labels, class_of: Labels, copies: npt.NDArray[np.bool_], *, squared: bool
) -> Float64Array:
    """Similarities of each example to the means of groups without it and its copies, the best of each label.

    Σ z over what is left of a group has product z_i·Σ z - Σ_copies z_i·z_j with the example, and squared length
    |Σ z|² - 2 Σ_copies z_j·Σ z + |Σ_copies z|².

    Args:
        groups: (n,), and class_of: (n_groups,); see `split_classes_in_groups`.
        squared: 1 - |z - mean|² / 2 instead of the cosine.
    """
    members = one_hot(groups, len(class_of), np.float64)  # (n, n_groups)
    sums = gram @ members  # (n, n_groups)
    squares, sizes = (sums * members).sum(axis=0), members.sum(axis=0)
    values = np.empty_like(sums)
    for row in range(len(gram)):
        gone = np.flatnonzero(copies[row])
        taken = members[gone]  # (copies, n_groups)
        left = sizes - taken.sum(axis=0)
        dots = sums[row] - gram[row, gone] @ taken
        lengths = (
            squares - 2 * (sums[gone] * taken).sum(axis=0) + ((gram[np.ix_(gone, gone)] @ taken) * taken).sum(axis=0)
        )
        lengths, counts = np.maximum(lengths, 1e-12), np.maximum(left, 1)
        cosines = dots / np.sqrt(lengths * max(gram[row, row], 1e-12))
        values[row] = dots / counts + (1 - lengths / counts**2) / 2 if squared else cosines
        values[row, left == 0] = -1
    best: Float64Array = np.maximum.reduceat(values, np.flatnonzero(np.diff(class_of, prepend=-1)), axis=1)
    return best


def _ridge_foreign(gram: Float64Array, labels: Labels, n_way: int) -> Float64Array:
    """Cosines of each label's examples to the other labels' prototypes without that label, (n, n_way).

    The block of a whole label leaves as `ridge.left_out_cosines` lets an example leave.
    """
    inverse = np.linalg.inv(gram + RIDGE * np.eye(len(gram)))
    crossed = gram @ inverse
    members = one_hot(labels, n_way, np.float64)
    coefficients = inverse @ (members - members.mean(axis=0))
    products = gram @ coefficients
    foreign = np.empty((len(gram), n_way))
    for label in range(n_way):
        own = np.flatnonzero(labels == label)
        gone = np.linalg.solve(inverse[np.ix_(own, own)], coefficients[own])
        left = coefficients - inverse[:, own] @ gone
        products_left = products - crossed[:, own] @ gone
        lengths = np.sqrt(np.maximum((left * products_left).sum(axis=0), 1e-12))
        foreign[own] = products_left[own] / lengths
    return foreign
