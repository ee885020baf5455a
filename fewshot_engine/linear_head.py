"""A regularised linear head, for people with many examples of each label, and the advice which classifier to use.

Multinomial logistic regression on L2-normalised embeddings, fitted by scikit-learn. At 1 to 5 examples it gains nothing
over prototypes (Chen et al. 2019); the specification puts the turn above 100 a label. Temperature scaling (Guo et al.
2017) on held-out examples makes its confidence a probability. Of strangers it knows nothing: prototypes are asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import ConfigError, DataError, EmptyClassError
from fewshot_engine.inference import EVIDENCE, Predictions, PrototypeModel, classify
from fewshot_engine.leave_one_out import near_copies
from fewshot_engine.prototypes import FloatArray, IntArray, l2_normalise

MANY_EXAMPLES = 100  # a label: above it the head is advised
STRENGTHS = (0.1, 1.0, 10.0, 100.0)  # tried for C, the inverse of the regularisation, in ascending order
FOLDS = 5
TEMPERATURE_SD = 0.5  # of its logarithm, around 1: a few examples that are all recognised do not make it sure of itself


@dataclass(frozen=True, eq=False)
class LinearHead:
    """Probabilities of labels are softmax((normalise(x) W' + b) / T).

    Attributes:
        weights: (n_way, dim) float32: W.
        biases: (n_way,) float32: b.
        strength: C, the inverse of the regularisation, as chosen.
        temperature: T, by the log-loss of examples held out at that strength; 1 where none could be.
        expected_accuracy: by cross-validation at that strength, 0 to 1; None where a label has one example, or nothing
            but near copies of one.
    """

    weights: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    strength: float
    temperature: float
    expected_accuracy: float | None

    def probabilities(self, embeddings: FloatArray) -> npt.NDArray[np.float32]:
        """(n, dim), raw, of the encoder that made the examples -> (n, n_way)."""
        logits = (l2_normalise(embeddings) @ self.weights.T + self.biases) / self.temperature
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        shares: npt.NDArray[np.float32] = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
        return shares


@dataclass(frozen=True)
class Advice:
    """Which classifier, and why in a sentence with the numbers."""

    classifier: Literal["prototypes", "linear head"]
    reason: str


def fit_linear_head(
    embeddings: FloatArray, labels: IntArray, n_way: int, *, strength: float | None = None
) -> LinearHead:
    """
    Args:
        embeddings: (n, dim), raw.
        labels: (n,), integers in [0, n_way).
        strength: C; None to choose among `STRENGTHS` by stratified cross-validation, near copies on one side: the
            strongest regularisation whose log-loss is within one standard error of the best (Breiman et al. 1984).
            Where a label has a single example nothing can be validated, and it is 1.

    Raises:
        ConfigError: the strength is not above 0.
        DataError: fewer than two labels.
        EmptyClassError: a label has no example.
        ValueError: the shapes do not fit.
    """
    if strength is not None and not strength > 0:
        raise ConfigError(f"strength is {strength}: it is above 0")
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(f"embeddings {embeddings.shape} and labels {labels.shape} do not belong together")
    if n_way < 2:
        raise DataError(f"a linear head tells labels apart: it needs 2; there are {n_way}")
    counts = np.bincount(labels, minlength=n_way)
    if (counts == 0).any():
        raise EmptyClassError(f"label {int(counts.argmin())} of {n_way} has no example, so nothing can be learnt of it")
    photos = _in_their_span(l2_normalise(embeddings).astype(np.float64))
    temperature, expected = 1.0, None
    folds = _deal(photos.coordinates, labels)
    if folds is not None:
        tried = (strength,) if strength else STRENGTHS
        held_out = _held_out_logits(photos.coordinates, labels, folds, tried)
        place = _simplest_within_noise(np.stack([_log_losses(logits, labels) for logits in held_out]))
        strength, temperature = tried[place], _temperature(held_out[place], labels)
        expected = float((held_out[place].argmax(axis=1) == labels).mean())
    strength = strength or 1.0
    weights, biases = _logistic(photos.coordinates, labels, strength)
    rows = (weights @ photos.axes).astype(np.float32)
    return LinearHead(rows, biases.astype(np.float32), strength, temperature, expected)


def classify_by_head(head: LinearHead, model: PrototypeModel, queries: FloatArray, *, top_k: int = 3) -> Predictions:
    """Labels and confidences of the head; distances to the labels' prototypes, and strangers, of the model.

    A head rests on no single examples, so there is no evidence: `nearest` is -1.

    Args:
        head, model: fitted on the same examples.
        queries: (n, dim), raw embeddings; n may be 0.
        top_k: how many labels to give; fewer when there are fewer.
    """
    probabilities, distances = head.probabilities(queries), 1 - model.similarities(model.prepare(queries))
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : max(1, top_k)]
    return Predictions(
        labels=order,
        confidences=np.take_along_axis(probabilities, order, axis=1),
        distances=np.take_along_axis(distances, order, axis=1),
        stranger=classify(model, queries, top_k=1).stranger,
        nearest=np.full((len(queries), 2 * EVIDENCE), -1),
        nearest_similarities=np.zeros((len(queries), 2 * EVIDENCE), dtype=np.float32),
    )


def advise(counts: Mapping[str, int]) -> Advice:
    """Which classifier suits a label set.

    Args:
        counts: label -> examples.

    Raises:
        DataError: there is no label.
    """
    if not counts:
        raise DataError("there are no labels to advise on: add one with at least one example photo")
    smallest = min(counts, key=lambda label: counts[label])
    fewest, labels = counts[smallest], len(counts)
    if labels < 2:
        return Advice(
            "prototypes",
            f"With one label there is nothing for a linear head to tell apart: a prototype of its {fewest} examples "
            "tells it from everything else.",
        )
    if fewest > MANY_EXAMPLES:
        return Advice(
            "linear head",
            f"Each of {labels} labels has {fewest} examples or more: above {MANY_EXAMPLES} a regularised linear head "
            "is worth its training.",
        )
    return Advice(
        "prototypes",
        f"{smallest} has {fewest} {'example' if fewest == 1 else 'examples'}: up to {MANY_EXAMPLES} a label prototypes "
        "are as good as a linear head, need no training, and take in a new label at once.",
    )


@dataclass(frozen=True, eq=False)
class _Span:
    """Photos by coordinates in their own span, where a linear classifier is the same and much smaller: x = c A."""

    coordinates: npt.NDArray[np.float64]  # (n, r)
    axes: npt.NDArray[np.float64]  # (r, dim), orthonormal


def _in_their_span(photos: npt.NDArray[np.float64]) -> _Span:
    n, dim = photos.shape
    if n >= dim:
        return _Span(photos, np.eye(dim))
    axes = np.linalg.qr(photos.T)[0].T
    return _Span(photos @ axes.T, axes)


def _deal(photos: npt.NDArray[np.float64], labels: IntArray) -> npt.NDArray[np.int64] | None:
    """(n,) a fold for each example: every label in each of them, near copies in one; None where that cannot be."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    alike = [connected_components(csr_array(near_copies(photos[own], np.zeros_like(own)))) for own in members]
    count = min(FOLDS, *(different for different, _ in alike))
    if count < 2:
        return None
    rng, folds = np.random.default_rng(0), np.empty(len(labels), dtype=np.int64)
    for own, (different, group) in zip(members, alike, strict=True):
        folds[own] = rng.permutation(different)[group] % count
    return folds


def _held_out_logits(
    photos: npt.NDArray[np.float64], labels: IntArray, folds: IntArray, strengths: tuple[float, ...]
) -> npt.NDArray[np.float64]:
    """(n_strengths, n, n_way): what a head says of each example that it never saw."""
    logits = np.empty((len(strengths), len(labels), int(labels.max()) + 1))
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        for row, strength in enumerate(strengths):
            weights, biases = _logistic(photos[~held], labels[~held], strength)
            logits[row, held] = photos[held] @ weights.T + biases
    return logits


def _log_losses(logits: npt.NDArray[np.float64], labels: IntArray) -> npt.NDArray[np.float64]:
    """(n,) of (n, n_way)."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses: npt.NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return losses


def _temperature(logits: npt.NDArray[np.float64], labels: IntArray) -> float:
    """The most probable one: likelihood of the held-out examples' labels times a log-normal prior."""
    offsets = np.linspace(-2.5, 2.5, 101)
    costs = [
        _log_losses(logits / np.exp(offset), labels).sum() + (offset / TEMPERATURE_SD) ** 2 / 2 for offset in offsets
    ]
    return float(np.exp(offsets[int(np.argmin(costs))]))


def _simplest_within_noise(losses: npt.NDArray[np.float64]) -> int:
    """The first row whose mean exceeds the best one's by no more than a standard error of their paired difference."""
    best = int(losses.mean(axis=1).argmin())
    excess = losses - losses[best]
    errors = excess.std(axis=1, ddof=1) / losses.shape[1] ** 0.5
    return int(np.flatnonzero(excess.mean(axis=1) <= errors)[0])


def _logistic(
    photos: npt.NDArray[np.float64], labels: IntArray, strength: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(n_way, r) and (n_way,); two labels have opposite rows, so that the softmax is the logistic function."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after 300 steps what is left does not change answers
        fitted = LogisticRegression(C=strength, max_iter=300, class_weight="balanced").fit(photos, labels)
    weights, biases = fitted.coef_, fitted.intercept_
    if len(weights) == 1:
        weights, biases = np.concatenate([-weights, weights]) / 2, np.concatenate([-biases, biases]) / 2
    return weights, biases
