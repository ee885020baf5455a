"""One task's query images answered together: BD-CSPN, α-TIM and soft k-means, on embeddings that an encoder has made.

Every method takes a task apart in the same way: `queries` (n, dim), `support` (m, dim), `labels` (m,), all rows of any
length, normalised here. It gives *similarities*, (n, n_way), in the units of a cosine: the answer is the largest, and
softmax(temperature x similarity) are the method's own probabilities. Prototypes never leave the span of the task's
photos, so they are kept as weights of photos, and the photos as their Gram matrix: 75 photos of 3,840 numbers are
multiplied once, and an iteration costs 75 x 75 products a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import ConfigError, EmptyClassError
from fewshot_engine.prototypes import FloatArray, IntArray, l2_normalise, one_hot
from fewshot_engine.ridge import answer_together

Float64Array = npt.NDArray[np.float64]
Method = Literal["ridge", "soft-k-means", "soft-k-means-shares", "bd-cspn", "alpha-tim"]


def soft_kmeans(
    queries: FloatArray,
    support: FloatArray,
    labels: IntArray,
    n_way: int,
    *,
    temperature: float = 15.0,
    iterations: int = 10,
    query_weight: float = 0.5,
    votes_for_itself: bool = False,
    learns_shares: bool = False,
    share_prior: float = 1.0,
) -> Float64Array:
    """Prototypes that take in the query images by the degree to which they belong (Ren et al. 2018, section 3.1.1).

    Deviations from the paper: cosine instead of the squared Euclidean distance, several iterations instead of one, a
    weight for query images below that of examples, and, unless `votes_for_itself`, each query image is compared with
    prototypes from which its own contribution is taken out. In a batch of few photos a class that contribution is
    most of what makes a wrong first answer stay.

    Args:
        temperature: multiplies cosines. Over six photo sets 10 to 20 are equally good; with `votes_for_itself` about
            20, with learned shares as well about 30.
        iterations: it settles within five.
        query_weight: of a query image beside an example's 1.
        learns_shares: each class has a prior probability, the share of the query images that belong to it (the
            mixing weights of an EM algorithm). It helps where classes are few and apart, and lets the largest class
            grow at the expense of its neighbours where they are not.
        share_prior: query images of each class that are taken to be there before looking, at least 0.

    Returns:
        (n, n_way) similarities; with shares, log(share) / temperature is part of them.

    Raises: as every method here, see `_Task.of`.
    """
    _require(temperature > 0, f"temperature is {temperature}: it is above 0")
    _require(iterations >= 0, f"iterations is {iterations}: it is 0 or more")
    _require(query_weight > 0, f"query weight is {query_weight}: it is above 0")
    _require(share_prior >= 0, f"share prior is {share_prior}: it is 0 or more")
    task = _Task.of(queries, support, labels, n_way)
    weights = task.members
    log_shares = np.zeros((n_way, 1))
    for _ in range(iterations):
        similarities = task.cosines(weights, leave_out_own=not votes_for_itself) + log_shares / temperature
        belongs = softmax(temperature * similarities, axis=0)  # (n_way, n)
        if learns_shares:
            counts = belongs.sum(axis=1, keepdims=True) + share_prior
            log_shares = np.log(np.maximum(counts, 1e-12) / counts.sum())
        weights = task.members.copy()
        weights[:, task.m :] = query_weight * belongs
    return (task.cosines(weights, leave_out_own=not votes_for_itself) + log_shares / temperature).T


def bd_cspn(
    queries: FloatArray,
    support: FloatArray,
    labels: IntArray,
    n_way: int,
    *,
    temperature: float = 10.0,
) -> Float64Array:
    """Prototype rectification (Liu et al. 2020): shift the query images onto the support, then pseudo-label them.

    The shift is the difference of the two means (their eq. 7). Each photo, example or query, then joins the class of
    the nearest basic prototype with the softmax of its cosines as weight (eqs. 4 to 6). Deviations: examples join
    their own class, as the paper says and its reference code does not; the weights are not divided by their sum, which
    a cosine would not notice.
    """
    _require(temperature > 0, f"temperature is {temperature}: it is above 0")
    task = _Task.of(queries, support, labels, n_way).shifted()
    basic = task.cosines(task.members, of_all=True)  # (n_way, m + n)
    belongs = softmax(temperature * basic, axis=0)
    joins = one_hot(basic.argmax(axis=0), n_way, np.float64).T
    joins[:, : task.m] = task.members[:, : task.m]
    return task.cosines(joins * belongs).T


def alpha_tim(
    queries: FloatArray,
    support: FloatArray,
    labels: IntArray,
    n_way: int,
    *,
    alpha: float = 2.0,
    temperature: float = 10.0,
    iterations: int = 100,
) -> Float64Array:
    """Class weights that maximise α-mutual information between query images and answers (Veilleux et al. 2021).

    The loss is the cross-entropy of the examples, minus the Tsallis α-entropy of the mean answer, plus the mean
    α-entropy of each answer (their eqs. 5 to 7, all weights 1); logits are -temperature / 2 x squared Euclidean
    distance. Deviations: gradient descent with momentum instead of Adam, because its steps stay in the span of the
    photos and do not depend on the axes (100 of them converge); α = 2 at every shot, where the paper tunes 2 at one and
    7 at five; temperature 10 instead of 15.

    Returns:
        (n, n_way) similarities: the logits over the temperature, up to a constant for each photo.
    """
    _require(alpha > 1, f"alpha is {alpha}: it is above 1 (1 is Shannon's entropy, which is TIM)")
    _require(temperature > 0, f"temperature is {temperature}: it is above 0")
    _require(iterations >= 0, f"iterations is {iterations}: it is 0 or more")
    task = _Task.of(queries, support, labels, n_way)
    truth = task.members[:, : task.m]
    weights = task.members / truth.sum(axis=1, keepdims=True)
    velocity = np.zeros_like(weights)
    step, momentum = 0.3 / temperature, 0.9
    for _ in range(iterations):
        p = softmax(temperature * task.closeness(weights), axis=0)  # (n_way, m + n)
        upstream = np.empty_like(p)  # d loss / d logit
        upstream[:, : task.m] = (p[:, : task.m] - truth) / task.m
        answers = p[:, task.m :]
        marginal = answers.mean(axis=1, keepdims=True) if task.n else answers
        slope = alpha / (alpha - 1) * (marginal ** (alpha - 1) - answers ** (alpha - 1)) / max(task.n, 1)
        upstream[:, task.m :] = answers * (slope - (answers * slope).sum(axis=0))
        # d logit / d w_k = temperature x (photo - w_k): a combination of photos again
        gradient = temperature * (upstream - upstream.sum(axis=1, keepdims=True) * weights)
        velocity = momentum * velocity - step * gradient
        weights = weights + velocity
    return task.closeness(weights)[:, task.m :].T


def ridge(queries: FloatArray, support: FloatArray, labels: IntArray, n_way: int) -> FloatArray:
    """`ridge.answer_together`, for rows of any length."""
    return answer_together(l2_normalise(queries), l2_normalise(support), labels, n_way)


# Measured on six photo sets, centred, with Dirichlet(2) shares of 50 query images, against each answered by itself:
# ridge +5.9 to +11.2 points at 1 example, +1.1 to +1.5 at 5; soft k-means as much at 1, but -1.8 to +1.8 at 5, with
# shares -2.4 to +2.0; BD-CSPN +2.3 to +4.1, -2.8 to -0.1; alpha-TIM +3.3 to +5.6, -0.7 to +1.1. Ridge alone never lost.
METHODS: dict[Method, Callable[[FloatArray, FloatArray, IntArray, int], FloatArray]] = {
    "ridge": ridge,
    "soft-k-means": soft_kmeans,
    "soft-k-means-shares": partial(soft_kmeans, temperature=30.0, votes_for_itself=True, learns_shares=True),
    "bd-cspn": bd_cspn,
    "alpha-tim": alpha_tim,
}


def softmax(logits: Float64Array, axis: int) -> Float64Array:
    """Along `axis`, without overflow."""
    exponentials = np.exp(logits - logits.max(axis=axis, keepdims=True))
    probabilities: Float64Array = exponentials / exponentials.sum(axis=axis, keepdims=True)
    return probabilities


@dataclass(frozen=True, eq=False)
class _Task:
    """The photos of one task, support first, by their Gram matrix; a prototype is a row of weights over them."""

    gram: Float64Array  # (m + n, m + n)
    members: Float64Array  # (n_way, m + n), 1 for the examples of each class
    m: int  # examples
    n: int  # query images

    @classmethod
    def of(cls, queries: FloatArray, support: FloatArray, labels: IntArray, n_way: int) -> _Task:
        """
        Raises:
            EmptyClassError: a class has no support example.
            ValueError: the shapes do not fit, or a label is out of range.
        """
        if queries.ndim != 2 or support.ndim != 2 or queries.shape[1] != support.shape[1]:
            raise ValueError(f"queries {queries.shape} and support {support.shape} do not belong together")
        if labels.shape != support.shape[:1]:
            raise ValueError(f"support {support.shape} and labels {labels.shape} do not belong together")
        if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < n_way:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}: they must lie in 0 to {n_way - 1}")
        counts = np.bincount(labels, minlength=n_way)
        if (counts == 0).any():
            raise EmptyClassError(f"label {int(counts.argmin())} of {n_way} has no example, so it has no prototype")
        photos = l2_normalise(np.concatenate([support, queries]))
        m, n = len(support), len(queries)
        members = np.zeros((n_way, m + n))
        members[:, :m] = one_hot(labels, n_way, np.float64).T
        return cls((photos @ photos.T).astype(np.float64), members, m, n)

    def shifted(self) -> _Task:
        """Query images moved by the difference between the support's mean and theirs."""
        if not self.n:
            return self
        move = np.concatenate([np.full(self.m, 1 / self.m), np.full(self.n, -1 / self.n)])
        mixing = np.eye(self.m + self.n)
        mixing[self.m :] += move
        return _Task(mixing @ self.gram @ mixing.T, self.members, self.m, self.n)

    def cosines(self, weights: Float64Array, *, leave_out_own: bool = False, of_all: bool = False) -> Float64Array:
        """To prototypes, (n_way, n); (n_way, m + n) when `of_all`. A photo or prototype of length 0 has cosine 0.

        With `leave_out_own` each photo is compared with prototypes from which it is taken out: Σ w_j z_j - w_i z_i.
        """
        start = 0 if of_all else self.m
        dots = weights @ self.gram  # (n_way, m + n)
        squares = (dots * weights).sum(axis=1, keepdims=True)  # |prototype|²
        lengths = np.diagonal(self.gram)[start:]
        dots, weights = dots[:, start:], weights[:, start:]
        if leave_out_own:
            squares = squares - 2 * weights * dots + weights**2 * lengths
            dots = dots - weights * lengths
        scale = np.sqrt(np.maximum(squares, 0) * lengths)
        cosines: Float64Array = np.where(scale > 1e-9, dots / np.maximum(scale, 1e-9), 0)
        return cosines

    def closeness(self, weights: Float64Array) -> Float64Array:
        """z·w - |w|² / 2 of every photo, (n_way, m + n): minus half the squared distance, up to |z|² / 2."""
        dots = weights @ self.gram
        closeness: Float64Array = dots - (dots * weights).sum(axis=1, keepdims=True) / 2
        return closeness


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigError(message)
