"""From a handful of labelled embeddings to answers that know their doubts.

A label's prototype is the normalised mean of its normalised examples, and the answer is the label of the largest cosine
(Snell et al. 2017 with the cosine of Vinyals et al. 2016). What is added here is honesty: a temperature that makes the
confidence a probability, a score for photos that are none of the labels, and what the examples say about themselves.
All of it is fitted on the examples, by leaving each out in turn; nothing needs torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.errors import CheckpointError, DataError
from fewshot_engine.prototypes import (
    FloatArray,
    IntArray,
    compute_prototypes,
    cosine_similarity,
    l2_normalise,
    one_hot,
)

Verdict = Literal["known", "unsure", "none"]
Float32Array = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# How many photos are taken to be strangers before they are looked at. A person who fears strangers more, or less,
# moves the threshold; the order of the photos stays.
STRANGER_SHARE = 1 / 3
NEAR_COPY = 0.98  # cosine above which two examples of a label count as one when either is left out
EVIDENCE = 3  # examples shown for the answer, and for the runner-up


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


@dataclass(frozen=True)
class PrototypeModel:
    """All that is needed to answer, without the photos.

    Attributes:
        prototypes: (n_way, dim), rows of length 1.
        support: (n_support, dim), rows of length 1, centred as the queries will be.
        support_labels: (n_support,), integers in [0, n_way).
        negatives: (m, dim), photos that a person said are none of the labels, prepared like `support`; m may be 0.
        centre: (dim,), subtracted from each normalised embedding; None for no centring.
        temperature: of the softmax over cosines.
        stranger_weights: bias, then the weights of the largest cosine, of the mean of the other labels' cosines, and of
            the nearest example's cosine, in the log-odds of being a stranger.
        expected_accuracy: leave-one-out hit rate over the examples that have company, 0 to 1.
        expected_accuracy_ci: half the width of its 95 % interval (Wilson).
    """

    prototypes: Float32Array
    support: Float32Array
    support_labels: npt.NDArray[np.int64]
    negatives: Float32Array
    centre: Float32Array | None
    temperature: float
    stranger_weights: tuple[float, ...]
    expected_accuracy: float | None
    expected_accuracy_ci: float | None
    per_label: tuple[LabelHealth, ...]

    @property
    def n_way(self) -> int:
        return len(self.prototypes)

    def to_bytes(self) -> bytes:
        """safetensors, with the numbers as JSON in its header."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "prototypes": self.prototypes,
            "support": self.support,
            "support_labels": self.support_labels,
            "negatives": self.negatives,
        }
        if self.centre is not None:
            tensors["centre"] = self.centre
        described = {
            "engine": ENGINE_VERSION,
            "temperature": self.temperature,
            "stranger_weights": self.stranger_weights,
            "expected_accuracy": self.expected_accuracy,
            "expected_accuracy_ci": self.expected_accuracy_ci,
            "per_label": [asdict(health) for health in self.per_label],
        }
        # A tensor of its own, because safetensors' Python interface does not give the header's text back from bytes.
        tensors["described"] = np.frombuffer(json.dumps(described).encode(), dtype=np.uint8)
        return save_tensors({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})

    @classmethod
    def from_bytes(cls, data: bytes) -> PrototypeModel:
        """The inverse of `to_bytes`; raises CheckpointError for anything else."""
        try:
            tensors = load_tensors(data)
            described = json.loads(tensors["described"].tobytes())
            return cls(
                prototypes=tensors["prototypes"],
                support=tensors["support"],
                support_labels=tensors["support_labels"],
                negatives=tensors["negatives"],
                centre=tensors.get("centre"),
                temperature=float(described["temperature"]),
                stranger_weights=tuple(map(float, described["stranger_weights"])),
                expected_accuracy=described["expected_accuracy"],
                expected_accuracy_ci=described["expected_accuracy_ci"],
                per_label=tuple(LabelHealth(**health) for health in described["per_label"]),
            )
        except Exception as error:  # safetensors raises an exception of its own, JSON and numpy theirs
            raise CheckpointError("these bytes hold no prototypes that this version can read") from error


@dataclass(frozen=True)
class Predictions:
    """Answers to n query photos; k labels each, best first.

    Attributes:
        labels: (n, k).
        confidences: (n, k), the probability of the label given that the photo is one of the labels.
        distances: (n, k), cosine distance to the label's prototype, 0 to 2.
        stranger: (n,), the probability that the photo is none of the labels.
        nearest: (n, 6), rows of the support set: the three examples of the answer nearest to the photo, then three of
            the runner-up; -1 where there are fewer.
        nearest_similarities: (n, 6), their cosines; 0 where there is none.
    """

    labels: npt.NDArray[np.int64]
    confidences: Float32Array
    distances: Float32Array
    stranger: Float32Array
    nearest: npt.NDArray[np.int64]
    nearest_similarities: Float32Array


def verdict(confidence: float, stranger: float, *, reject_above: float = 0.5, unsure_below: float = 0.6) -> Verdict:
    """What to tell a person. Comparisons of stored numbers alone, so a query on the database can do the same."""
    if stranger > reject_above:
        return "none"
    return "unsure" if confidence < unsure_below else "known"


def fit(
    support: FloatArray,
    labels: IntArray,
    n_way: int,
    *,
    negatives: FloatArray | None = None,
    centre: FloatArray | None = None,
) -> PrototypeModel:
    """Prototypes, temperature and stranger score of one label set.

    Args:
        support: (n_support, dim), raw embeddings.
        labels: (n_support,), integers in [0, n_way).
        negatives: (m, dim), raw embeddings of photos that are none of the labels.
        centre: (dim,), the mean of L2-normalised embeddings of photos like these; see `mean_embedding`.

    Raises:
        DataError: there is no label at all.
        EmptyClassError: a label has no example.
        ValueError: the shapes do not fit, or an embedding is not finite.
    """
    if n_way < 1:
        raise DataError("there are no labels: add one with at least one example photo")
    label_of: Labels = labels.astype(np.int64)
    prepared = _prepare(support, centre)
    rivals = _prepare(negatives, centre) if negatives is not None and len(negatives) else prepared[:0]
    prototypes = l2_normalise(compute_prototypes(prepared, label_of, n_way))
    left_out = _leave_one_out(prepared, label_of, n_way)
    scale = _Scale.of(left_out, prepared, centred=centre is not None)
    expected, interval = _expected_accuracy(left_out)
    return PrototypeModel(
        prototypes=prototypes.astype(np.float32),
        support=prepared.astype(np.float32),
        support_labels=label_of,
        negatives=rivals.astype(np.float32),
        centre=None if centre is None else np.asarray(centre, dtype=np.float32),
        temperature=_fit_temperature(left_out, scale),
        stranger_weights=_fit_stranger_weights(left_out, scale, prototypes, rivals, prepared),
        expected_accuracy=expected,
        expected_accuracy_ci=interval,
        per_label=_label_health(left_out, n_way),
    )


def classify(model: PrototypeModel, queries: FloatArray, *, top_k: int = 3) -> Predictions:
    """Answer for each query photo by its own (inductively).

    Args:
        queries: (n, dim), raw embeddings of the encoder that made the support; n may be 0.
        top_k: how many labels to give; fewer when the model has fewer.
    """
    prepared = _prepare(queries, model.centre).astype(np.float32)
    cosines = np.clip(prepared @ model.prototypes.T, -1, 1)  # (n, n_way)
    similarities = np.clip(prepared @ model.support.T, -1, 1)  # (n, n_support)
    k = max(1, min(top_k, model.n_way))
    order = np.argsort(-cosines, axis=1, kind="stable")
    confidences = _softmax(cosines / model.temperature)
    nearest, nearest_similarities = _evidence(similarities, model.support_labels, order)
    return Predictions(
        labels=order[:, :k],
        confidences=np.take_along_axis(confidences, order[:, :k], axis=1),
        distances=1 - np.take_along_axis(cosines, order[:, :k], axis=1),
        stranger=_stranger_probability(model, prepared, cosines, similarities),
        nearest=nearest,
        nearest_similarities=nearest_similarities,
    )


def mean_embedding(embeddings: FloatArray) -> FloatArray:
    """The centre of a collection: the mean of its L2-normalised embeddings, (n, dim) -> (dim,)."""
    centre: FloatArray = l2_normalise(embeddings).mean(axis=0)
    return centre


def distance_from_training(embeddings: FloatArray, class_means: FloatArray) -> float:
    """How far photos lie from what a model was trained on: the mean of 1 - cosine to the nearest training class.

    Measured with Lite0, Lite1 and Lite2 fused, trained on half the classes of one of four photo sets, for as few as
    three photos: 0.08 to 0.45 for classes of the same set that were not trained on, 0.45 to 0.76 for the other sets
    (the smallest being groceries for a model of 64 everyday things). Where the line is depends on how varied the
    training was: compare with `distance_of_unseen_classes`, of which it is 0.7 to 1.6 times for photos of that kind.

    Args:
        embeddings: (n, dim), raw, of the encoder as it was before it was adapted; n at least 1.
        class_means: (n_classes, dim), each the mean of the L2-normalised embeddings of a training class.

    Returns:
        0 (each photo is the mean of a class) to 2; photos of the training classes themselves come to about 0.75 times
        `distance_of_unseen_classes`.
    """
    if len(embeddings) == 0 or len(class_means) == 0:
        raise DataError(f"a distance needs photos and classes; there are {len(embeddings)} and {len(class_means)}")
    return float(1 - cosine_similarity(embeddings, class_means).max(axis=1).mean())


def distance_of_unseen_classes(embeddings: FloatArray, labels: IntArray, class_means: FloatArray) -> float:
    """`distance_from_training` that photos of one more class of this kind would have: each class against the others.

    Args:
        embeddings: (n, dim), raw, of the training photos.
        labels: (n,), rows of `class_means`.
        class_means: (n_classes, dim), as above; at least two.
    """
    if len(class_means) < 2:
        raise DataError(f"an unseen class needs 2 classes to be told from; there are {len(class_means)}")
    cosines = cosine_similarity(embeddings, class_means)
    cosines[np.arange(len(labels)), labels] = -1
    return float(1 - cosines.max(axis=1).mean())


def _prepare(embeddings: FloatArray, centre: FloatArray | None) -> FloatArray:
    """Normalised, centred, normalised again: (n, dim) -> (n, dim)."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings have shape {embeddings.shape}: they must be (n, dim)")
    if not np.isfinite(embeddings).all():
        raise ValueError("an embedding holds a number that is not finite")
    prepared = l2_normalise(np.asarray(embeddings, dtype=np.float32))
    return prepared if centre is None else l2_normalise(prepared - np.asarray(centre, dtype=np.float32))


@dataclass(frozen=True)
class _LeftOut:
    """Each example against the label set as it would be without it (without its near copies, to be exact)."""

    labels: npt.NDArray[np.int64]  # (n,)
    cosines: FloatArray  # (n, n_way) to the prototypes; that of the own label is built without the example
    has_company: npt.NDArray[np.bool_]  # (n,) whether its label has another, different example
    nearest_known: FloatArray  # (n,) cosine to the nearest other example of any label
    nearest_stranger: FloatArray  # (n,) the same without its own label
    mean_across: float  # mean cosine between examples of different labels

    @property
    def hits(self) -> npt.NDArray[np.bool_]:
        recognised: npt.NDArray[np.bool_] = self.cosines.argmax(axis=1) == self.labels
        return recognised & self.has_company


def _leave_one_out(support: FloatArray, labels: Labels, n_way: int) -> _LeftOut:
    """All left-out prototypes at once, from the examples' Gram matrix: no loop over photos, no (n, n, dim)."""
    n = len(support)
    rows = np.arange(n)
    members = one_hot(labels, n_way, np.float32)  # (n, n_way)
    gram = support @ support.T  # (n, n)
    dots = gram @ members  # (n, n_way), example · sum of the label's examples
    square = np.maximum((dots * members).sum(axis=0), 1e-12)  # (n_way,), |sum|²
    same = labels[:, None] == labels[None, :]
    copies = (same & (gram > NEAR_COPY)) | np.eye(n, dtype=bool)
    # Without the example and its copies: dot = s·(sum − copies), |sum − copies|² = |sum|² − 2 sum·copies + |copies|².
    weights = copies.astype(np.float32)
    own = (members * dots).sum(axis=1)  # (n,)
    own_dot = own - (weights * gram).sum(axis=1)
    own_square = square[labels] - 2 * weights @ own + _squared_sums(weights, gram)
    cosines = dots / np.sqrt(square)
    cosines[rows, labels] = own_dot / np.sqrt(np.maximum(own_square, 1e-12))
    has_company = copies.sum(axis=1) < members.sum(axis=0)[labels]
    cosines[~has_company, labels[~has_company]] = -1
    others = np.where(same, -np.inf, gram).max(axis=1, initial=-1)
    own_nearest = np.where(same & ~copies, gram, -np.inf).max(axis=1, initial=-1)
    across = gram[~same]
    return _LeftOut(
        labels=labels,
        cosines=np.clip(cosines, -1, 1),
        has_company=has_company,
        nearest_known=np.maximum(others, own_nearest),
        nearest_stranger=others,
        mean_across=float(across.mean()) if across.size else float("nan"),
    )


def _squared_sums(weights: FloatArray, gram: FloatArray) -> FloatArray:
    """|Σ_j weights_ij s_j|² for each i; the costly product only for examples that do have a copy."""
    sums = np.diag(gram).copy()
    several = np.flatnonzero(weights.sum(axis=1) > 1)
    sums[several] = ((weights[several] @ gram) * weights[several]).sum(axis=1)
    return sums


# Measured on clothing and grocery with EfficientNet-Lite0: 2 to 8 labels of 1 to 8 examples, 1,000 label sets without
# and 1,000 with centring; logistic regression, each set's query photos being known and those of other labels strangers.
_PRIOR_TEMPERATURE = 0.08  # in units of the scale
_PRIOR_TEMPERATURE_SD = 0.45  # of its logarithm
_PRIOR_STRANGER = {  # by whether embeddings are centred: bias; best, others, nearest, in units of the scale
    False: np.array([0.07, -2.71, 0.27, -2.22]),
    True: np.array([-0.06, -3.12, -2.72, -2.33]),
}
_PRIOR_STRANGER_SD = np.array([1.0, 2.0, 2.0, 2.0])  # wide enough for a label set to speak for itself
_PRIOR_LOG_SHOT = 0.29  # added to the bias for each e-fold of examples a label
_PRIOR_LOG_WAY = 0.39  # and of labels
_LONE_LABEL_COSINE = {False: 0.35, True: 0.0}  # between unrelated photos; by whether they are centred


@dataclass(frozen=True)
class _Scale:
    """The units in which the cosines of a label set are measured: 0 for unrelated photos, 1 for identical ones."""

    across: float  # mean cosine of an example to the prototypes of other labels
    examples_across: float  # and to their examples
    log_shot: float  # of the mean number of examples a label
    log_way: float
    centred: bool

    @classmethod
    def of(cls, left_out: _LeftOut, prepared: FloatArray, *, centred: bool) -> _Scale:
        n, n_way = left_out.cosines.shape
        log_shot, log_way = float(np.log(n / n_way)), float(np.log(n_way))
        if n_way == 1:
            between = _LONE_LABEL_COSINE[centred]
            # Averaging cancels what the examples do not share, so a prototype is more like anything than an example is.
            length = float(np.linalg.norm(prepared.mean(axis=0)))
            return cls(min(between / max(length, 0.3), 0.9), between, log_shot, log_way, centred)
        total = left_out.cosines.sum() - left_out.cosines[np.arange(n), left_out.labels].sum()
        across = float(total) / (n * (n_way - 1))
        return cls(min(across, 0.95), min(left_out.mean_across, 0.95), log_shot, log_way, centred)

    def features(self, best: FloatArray, others: FloatArray, nearest: FloatArray) -> FloatArray:
        """(n,) cosines to the best prototype, to the others on average, to the nearest example -> (n, 3)."""
        spread = 1 - self.across
        columns = (best - self.across) / spread, (others - self.across) / spread
        return np.stack([*columns, (nearest - self.examples_across) / (1 - self.examples_across)], axis=1)


def _fit_temperature(left_out: _LeftOut, scale: _Scale) -> float:
    """Most probable temperature: likelihood of the left-out examples' labels times a log-normal prior.

    Where no example has company (one a label) that is the prior, in proportion to how far apart the labels are.
    """
    centre = float(np.log(_PRIOR_TEMPERATURE * (1 - scale.across)))
    use = left_out.has_company
    if left_out.cosines.shape[1] < 2 or not use.any():
        return float(np.exp(centre))
    grid = centre + np.linspace(-2.5, 2.5, 21)
    cosines = left_out.cosines[use].astype(np.float32)
    own = cosines[np.arange(len(cosines)), left_out.labels[use]]
    shifted = cosines - cosines.max(axis=1, keepdims=True)
    log_posterior = []
    for log_temperature in grid:
        sharpness = np.float32(np.exp(-log_temperature))
        log_sum = np.log(np.exp(shifted * sharpness).sum(axis=1))
        log_likelihood = float((sharpness * (own - cosines.max(axis=1)) - log_sum).sum())
        log_posterior.append(log_likelihood - ((log_temperature - centre) / _PRIOR_TEMPERATURE_SD) ** 2 / 2)
    return float(np.exp(grid[int(np.argmax(log_posterior))]))


def _fit_stranger_weights(
    left_out: _LeftOut, scale: _Scale, prototypes: FloatArray, negatives: FloatArray, support: FloatArray
) -> tuple[float, ...]:
    """Logistic regression from three cosines to "none of these", most probable under a measured prior.

    Known: each example against the set without it. Strangers: each example against the set without its whole label, and
    the negatives. With one label, or one example a label, there are no known ones, and the prior alone decides; its
    units, `_Scale`, still come from this label set.
    """
    prior = _PRIOR_STRANGER[scale.centred].copy()
    prior[0] += _PRIOR_LOG_SHOT * scale.log_shot + _PRIOR_LOG_WAY * scale.log_way
    n_way = len(prototypes)
    known, strangers = _calibration_features(left_out, scale)
    if len(negatives) and n_way > 1:
        strangers = np.concatenate([strangers, scale.features(*_statistics(negatives, prototypes, support, scale))])
    weights = prior
    if len(known) and len(strangers):
        # With one label less, and one example less, the odds lie a little elsewhere: the prior knows by how much.
        shot = float(np.exp(scale.log_shot))
        shift_known = _PRIOR_LOG_SHOT * float(np.log(max(shot - 1, 1) / shot))
        shift_strangers = _PRIOR_LOG_WAY * float(np.log((n_way - 1) / n_way))
        weights = _logistic_map(known, strangers, prior, shift_known=shift_known, shift_strangers=shift_strangers)
    return _unscaled(weights, scale, n_way)


def _calibration_features(left_out: _LeftOut, scale: _Scale) -> tuple[FloatArray, FloatArray]:
    """Features of the examples as known photos (n_known, 3) and as strangers (n, 3); both empty for a single label."""
    n, n_way = left_out.cosines.shape
    if n_way < 2:
        return np.empty((0, 3)), np.empty((0, 3))
    known = left_out.has_company
    best, others = _best_and_others(left_out.cosines[known], scale)
    known_features = scale.features(best, others, left_out.nearest_known[known])
    foreign = left_out.cosines[np.arange(n_way) != left_out.labels[:, None]].reshape(n, n_way - 1)
    best, others = _best_and_others(foreign, scale)
    return known_features, scale.features(best, others, left_out.nearest_stranger)


def _best_and_others(cosines: FloatArray, scale: _Scale) -> tuple[FloatArray, FloatArray]:
    """(n, n_way) -> the largest, and the mean of the rest: what unrelated photos have, where there is no rest."""
    best = cosines.max(axis=1)
    rest = cosines.shape[1] - 1
    others = (cosines.sum(axis=1) - best) / rest if rest else np.full_like(best, scale.across)
    return best, others


def _statistics(
    photos: FloatArray, prototypes: FloatArray, support: FloatArray, scale: _Scale
) -> tuple[FloatArray, FloatArray, FloatArray]:
    best, others = _best_and_others(photos @ prototypes.T, scale)
    return best, others, (photos @ support.T).max(axis=1)


def _logistic_map(
    known: FloatArray, strangers: FloatArray, prior: FloatArray, *, shift_known: float, shift_strangers: float
) -> FloatArray:
    """Newton's method on the log posterior of (bias, three weights), prior normal around `prior`.

    The two kinds are weighted to STRANGER_SHARE, together to the number of examples: an example seen twice, once as
    either kind, is one observation.
    """
    x = np.concatenate([known, strangers]).astype(np.float64)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)  # (n, 4)
    y = np.repeat([0.0, 1.0], [len(known), len(strangers)])
    offset = np.repeat([shift_known, shift_strangers], [len(known), len(strangers)])
    each = len(known) * (1 - STRANGER_SHARE) / len(known), len(known) * STRANGER_SHARE / len(strangers)
    weight = np.repeat(each, [len(known), len(strangers)])
    precision = np.diag(_PRIOR_STRANGER_SD**-2.0)
    theta = prior.copy()
    for _ in range(12):
        p = 1 / (1 + np.exp(-np.clip(x @ theta + offset, -30, 30)))
        gradient = x.T @ (weight * (p - y)) + precision @ (theta - prior)
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + precision
        step = np.linalg.solve(hessian, gradient)
        theta = theta - step / max(1.0, float(np.abs(step).max()) / 2)  # at most 2 at a time: it cannot run away
    return theta


def _unscaled(weights: FloatArray, scale: _Scale, n_way: int) -> tuple[float, ...]:
    """The same linear score on the raw cosines."""
    bias, best, others, nearest = (float(weight) for weight in weights)
    spread, examples_spread = 1 - scale.across, 1 - scale.examples_across
    bias -= (best + others) * scale.across / spread + nearest * scale.examples_across / examples_spread
    if n_way == 1:  # there are no others: their mean is what unrelated photos have, a constant
        return (bias + others * scale.across / spread, best / spread, 0.0, nearest / examples_spread)
    return (bias, best / spread, others / spread, nearest / examples_spread)


def _stranger_probability(
    model: PrototypeModel, queries: Float32Array, cosines: Float32Array, similarities: Float32Array
) -> Float32Array:
    bias, w_best, w_others, w_nearest = model.stranger_weights
    best = cosines.max(axis=1)
    others = (cosines.sum(axis=1) - best) / max(1, model.n_way - 1)
    nearest = similarities.max(axis=1)
    probability = _sigmoid(bias + w_best * best + w_others * others + w_nearest * nearest)
    if len(model.negatives):
        # A negative is a rival of the nearest example, at the same temperature.
        rival = np.clip(queries @ model.negatives.T, -1, 1).max(axis=1)
        probability = 1 - (1 - probability) * (1 - _sigmoid((rival - nearest) / model.temperature))
    return probability.astype(np.float32)


def _evidence(
    similarities: Float32Array, labels: npt.NDArray[np.int64], order: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Float32Array]:
    """Rows and cosines of the nearest examples of the first and the second label in `order`; (n, 2 × EVIDENCE) each."""
    n, n_support = similarities.shape
    rows = np.full((n, 2 * EVIDENCE), -1, dtype=np.int64)
    values = np.zeros((n, 2 * EVIDENCE), dtype=np.float32)
    count = min(EVIDENCE, n_support)
    for place in range(min(2, order.shape[1])):
        of_label = np.where(labels[None, :] == order[:, place, None], similarities, -np.inf)  # (n, n_support)
        top = np.argsort(-of_label, axis=1, kind="stable")[:, :count]
        found = np.take_along_axis(of_label, top, axis=1)
        start = place * EVIDENCE
        rows[:, start : start + count] = np.where(np.isfinite(found), top, -1)
        values[:, start : start + count] = np.where(np.isfinite(found), found, 0)
    return rows, values


def _expected_accuracy(left_out: _LeftOut) -> tuple[float | None, float | None]:
    """Leave-one-out hit rate, and half the width of Wilson's 95 % interval (Wilson 1927)."""
    n = int(left_out.has_company.sum())
    if n == 0 or left_out.cosines.shape[1] < 2:
        return None, None
    rate = float(left_out.hits.sum()) / n
    z = 1.96
    return rate, z / (1 + z * z / n) * float(np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)))


def _label_health(left_out: _LeftOut, n_way: int) -> tuple[LabelHealth, ...]:
    answers = left_out.cosines.argmax(axis=1)
    return tuple(_health_of(label, left_out, answers, n_way) for label in range(n_way))


def _health_of(label: int, left_out: _LeftOut, answers: npt.NDArray[np.int64], n_way: int) -> LabelHealth:
    own = left_out.labels == label
    rows = np.flatnonzero(own & left_out.has_company)
    if len(rows) == 0 or n_way < 2:
        return LabelHealth(int(own.sum()))
    missed = rows[answers[rows] != label]
    if len(missed) == 0:
        return LabelHealth(int(own.sum()), expected=1.0)
    farthest = int(missed[left_out.cosines[missed, label].argmin()])
    return LabelHealth(
        examples=int(own.sum()),
        expected=1 - len(missed) / len(rows),
        confused_with=int(np.bincount(answers[missed], minlength=n_way).argmax()),
        outlier=farthest if len(rows) >= 3 else None,  # of two examples nobody can say which is the odd one
    )


def _softmax(logits: FloatArray) -> Float32Array:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    probabilities: Float32Array = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    return probabilities


def _sigmoid(logits: FloatArray) -> FloatArray:
    probability: FloatArray = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    return probability
