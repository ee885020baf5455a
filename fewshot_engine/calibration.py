"""Temperature and stranger score of a label set: how sure its answers may be, fitted on its own examples.

Each example left out in turn is a photo whose label is known; the same against the set without its whole label is a
stranger. Few examples say little, so both are most probable under priors that were measured on other label sets.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fewshot_engine.leave_one_out import LeftOut
from fewshot_engine.prototypes import FloatArray

# How many photos are taken to be strangers before they are looked at. A person who fears strangers more, or less,
# moves the threshold; the order of the photos stays.
STRANGER_SHARE = 1 / 3
# Measured on six photo sets (clothes, groceries, everyday things, letters), with Lite0 alone and with three encoders
# fused, on label sets of 2 to 10 labels with 1 to 8 examples, half of them centred; logistic regression, each set's
# query photos being known and those of other labels strangers. Neither the nearest example's cosine nor the mean of the
# other labels' was of further use.
_PRIOR_TEMPERATURE = 0.078  # in units of the scale, with one example a label
_PRIOR_TEMPERATURE_SHOT = -0.35  # power of the number of examples
_PRIOR_TEMPERATURE_SD = 0.45  # of its logarithm
_PRIOR_STRANGER = {  # by whether there is a centre: bias; best cosine to a mean, to a prototype, in units of the scale
    False: np.array([0.93, -4.2, -2.9]),
    True: np.array([0.1, -6.7, 0.0]),
}
_PRIOR_STRANGER_SD = np.array([1.0, 2.0, 2.0])  # wide enough for a label set to speak for itself
_PRIOR_LOG_SHOT = {False: 0.14, True: 0.24}  # added to the bias for each e-fold of examples a label
_PRIOR_LOG_WAY = {False: 0.14, True: 0.5}  # and of labels
_LONE_LABEL_COSINE = {False: 0.35, True: 0.0}  # between unrelated photos; by whether they are centred


@dataclass(frozen=True)
class Scale:
    """The units in which a label set's similarities are measured: 0 for unrelated photos, 1 for identical ones."""

    across: float  # mean similarity of an example to other labels
    across_means: float  # the same to the means of their examples
    log_shot: float  # of the mean number of examples a label
    log_way: float
    centred: bool

    @classmethod
    def of(cls, by_rule: LeftOut, by_means: LeftOut, prepared: FloatArray, *, centred: bool) -> Scale:
        n, n_way = by_rule.similarities.shape
        if n_way == 1:
            # Averaging cancels what the examples do not share, so a prototype is more like anything than an example is.
            length = float(np.linalg.norm(prepared.mean(axis=0)))
            between = min(_LONE_LABEL_COSINE[centred] / max(length, 0.3), 0.9)
            return cls(between, between, float(np.log(n)), 0.0, centred)
        across, across_means = min(by_rule.across, 0.95), min(by_means.across, 0.95)
        return cls(across, across_means, float(np.log(n / n_way)), float(np.log(n_way)), centred)

    def features(self, to_means: FloatArray, to_prototypes: FloatArray) -> FloatArray:
        """Two (n, n_way) -> (n, 2), the largest of each."""
        best = to_means.max(axis=1) - self.across_means, to_prototypes.max(axis=1) - self.across
        return np.stack([best[0] / (1 - self.across_means), best[1] / (1 - self.across)], axis=1)


def fit_temperature(by_rule: LeftOut, scale: Scale) -> float:
    """Most probable temperature: likelihood of the left-out examples' labels times a log-normal prior.

    Where no example has company (one a label) that is the prior, in proportion to how far apart the labels are. An
    example that is left out meets a label with one example less, where a higher temperature is right; that much is
    taken off again.
    """
    centre = float(np.log(_PRIOR_TEMPERATURE * (1 - scale.across))) + _PRIOR_TEMPERATURE_SHOT * scale.log_shot
    use = by_rule.has_company
    if by_rule.similarities.shape[1] < 2 or not use.any():
        return float(np.exp(centre))
    shot = max(float(np.exp(scale.log_shot)), 2)
    one_less = _PRIOR_TEMPERATURE_SHOT * float(np.log((shot - 1) / shot))  # above 0
    offsets = np.linspace(-2.5, 2.5, 21)
    grid = centre + one_less + offsets
    cosines = by_rule.similarities[use].astype(np.float32)
    own = cosines[np.arange(len(cosines)), by_rule.labels[use]]
    shifted = cosines - cosines.max(axis=1, keepdims=True)
    log_posterior = []
    for log_temperature, offset in zip(grid, offsets, strict=True):
        sharpness = np.float32(np.exp(-log_temperature))
        log_sum = np.log(np.exp(shifted * sharpness).sum(axis=1))
        log_likelihood = float((sharpness * (own - cosines.max(axis=1)) - log_sum).sum())
        log_posterior.append(log_likelihood - (offset / _PRIOR_TEMPERATURE_SD) ** 2 / 2)
    return float(np.exp(centre + offsets[int(np.argmax(log_posterior))]))


def fit_stranger_weights(
    by_rule: LeftOut, by_means: LeftOut, scale: Scale, of_negatives: tuple[FloatArray, FloatArray] | None
) -> tuple[float, ...]:
    """Logistic regression from two similarities to "none of these", most probable under a measured prior.

    Known: each example against the set without it. Strangers: each example against the set without its whole label, and
    the negatives. With one label, or one example a label, there are no known ones, and the prior alone decides; its
    units, `Scale`, still come from this label set.

    Args:
        by_rule, by_means: the examples left out, as the label set answers and by the cosine to class means.
        of_negatives: similarities of photos that are none of the labels, to the means and to the prototypes, (m, n_way)
            each; None where there are no such photos.

    Returns:
        Bias, then the weights of the largest similarity to a mean and to a prototype, in the log-odds.
    """
    n_way = by_rule.similarities.shape[1]
    log_shot, log_way = _PRIOR_LOG_SHOT[scale.centred], _PRIOR_LOG_WAY[scale.centred]
    prior = _PRIOR_STRANGER[scale.centred].copy()
    prior[0] += log_shot * scale.log_shot + log_way * scale.log_way
    use = by_rule.has_company
    if n_way < 2 or not use.any():
        return _unscaled(prior, scale)
    known = scale.features(by_means.similarities[use], by_rule.similarities[use])
    strangers = scale.features(by_means.foreign, by_rule.foreign)
    if of_negatives is not None:
        strangers = np.concatenate([strangers, scale.features(*of_negatives)])
    # With one label less, and one example less, the odds lie a little elsewhere: the prior knows by how much.
    shot = float(np.exp(scale.log_shot))
    weights = _logistic_map(
        known,
        strangers,
        prior,
        shift_known=log_shot * float(np.log(max(shot - 1, 1) / shot)),
        shift_strangers=log_way * float(np.log((n_way - 1) / n_way)),
    )
    return _unscaled(weights, scale)


def _logistic_map(
    known: FloatArray, strangers: FloatArray, prior: FloatArray, *, shift_known: float, shift_strangers: float
) -> FloatArray:
    """Newton's method on the log posterior of (bias, two weights), prior normal around `prior`.

    The two kinds are weighted to STRANGER_SHARE, together to the number of examples: an example seen twice, once as
    either kind, is one observation.
    """
    x = np.concatenate([known, strangers]).astype(np.float64)
    x = np.concatenate([np.ones((len(x), 1)), x], axis=1)  # (n, 3)
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


def _unscaled(weights: FloatArray, scale: Scale) -> tuple[float, ...]:
    """The same linear score on the raw similarities."""
    bias, to_mean, to_prototype = (float(weight) for weight in weights)
    to_mean, to_prototype = to_mean / (1 - scale.across_means), to_prototype / (1 - scale.across)
    return (bias - to_mean * scale.across_means - to_prototype * scale.across, to_mean, to_prototype)
