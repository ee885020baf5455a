"""What a label set is best answered with: chosen on its own examples, or by what was measured where they are too few.

Both choices here walk a list from the simplest to the most elaborate and move on only for a gain beyond noise: a paired
difference above `NOISE` standard errors. On 25 examples a single one is four points, so most differences are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.inference import fit, left_out
from fewshot_engine.prototypes import FloatArray, IntArray, Rule
from fewshot_engine.transductive import METHODS, Method

NOISE = 1.64  # standard errors: one time in twenty by chance
EXAMPLES_TO_SPLIT = 6  # of some label, before several prototypes are tried

# What answers where nothing can be left out, with one example a label. Over six photo sets ridge prototypes gained 0 to
# 2 points on class means at 1 shot, and a batch answered together 5 to 10, with equal and with unequal shares; neither
# lost on any of the sets.
PRIOR_RULE = Rule()
PRIOR_BATCH_METHOD: Method = "ridge"


@dataclass(frozen=True, eq=False)
class Candidate:
    """A way to answer.

    Attributes:
        name: for people, such as "class means, mirrored".
        support: (n, dim), raw embeddings of the examples, in the views of this candidate.
        centre: (dim,) of photos like these in the same views, or None.
    """

    name: str
    support: FloatArray
    rule: Rule = PRIOR_RULE
    centre: FloatArray | None = None


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen candidate.

    Attributes:
        accuracies: leave-one-out hit rate of each candidate, in order, 0 to 1; empty where nothing could be left out.
        reason: a sentence with the numbers.
    """

    candidate: Candidate
    accuracies: tuple[float, ...]
    reason: str


@dataclass(frozen=True)
class BatchChoice:
    """Whether, and how, to answer a batch together.

    Attributes:
        method: None where each photo is better answered by itself.
        gain: in accuracy over answering each by itself, on resampled batches; None where none could be drawn.
        reason: a sentence with the numbers.
    """

    method: Method | None
    gain: float | None
    reason: str


def candidates(
    support: Mapping[str, FloatArray],
    labels: IntArray,
    *,
    centres: Mapping[str, FloatArray] | None = None,
    usual: Rule = PRIOR_RULE,
) -> tuple[Candidate, ...]:
    """The ways to answer that are worth trying, the usual one first.

    Args:
        support: views -> (n, dim) raw embeddings of the same examples; the first is the usual one.
        labels: (n,); with six examples of a label, several prototypes are among the candidates.
        centres: views -> (dim,), where there is a centre.
        usual: the rule to prefer, one of those without several prototypes.

    Raises:
        ConfigError: no views.
    """
    if not support:
        raise ConfigError("there are no embeddings to choose among: give those of one view at least")
    rules = {
        "ridge": PRIOR_RULE,
        "class means": Rule("cosine"),
        "class means, not centred": Rule("cosine", centred=False),
        "squared Euclidean": Rule("euclidean"),
    }
    if np.bincount(labels).max(initial=0) >= EXAMPLES_TO_SPLIT:
        rules |= {f"{count} prototypes a label": Rule("cosine", prototypes=count) for count in (2, 3)}
    return tuple(
        Candidate(f"{name}, {view}", photos, rule, (centres or {}).get(view))
        for name, rule in sorted(rules.items(), key=lambda named: named[1] != usual)  # the others stay in order
        for view, photos in support.items()
    )


def choose_rule(among: Sequence[Candidate], labels: IntArray, n_way: int) -> Choice:
    """By leaving each example out: the first candidate, unless a later one is better beyond noise.

    Args:
        among: from the one to prefer to the last resort; of the same examples.
        labels: (n,), integers in [0, n_way), none without an example.

    Raises:
        ConfigError: no candidates.
        EmptyClassError, ValueError: as `inference.fit` does.
    """
    if not among:
        raise ConfigError("there are no candidates to choose among")
    examined = [left_out(one.support, labels, n_way, centre=one.centre, rule=one.rule) for one in among]
    use = np.logical_and.reduce([found.has_company for found in examined])
    if n_way < 2 or not use.any():
        why = "with one label" if n_way < 2 else "with one example a label"
        return Choice(among[0], (), f"Nothing can be left out {why}: {among[0].name} is what does best elsewhere.")
    hits = np.stack([found.hits[use] for found in examined]).astype(float)  # (candidates, examples)
    place = _walk(hits)
    rates = tuple(float(rate) for rate in hits.mean(axis=1))
    recognised = f"{among[place].name} recognises {_percent(rates[place])} of {use.sum()} examples left out in turn"
    if place == 0:
        best = int(np.argmax(rates))
        rest = (
            "and nothing else more"
            if rates[best] <= rates[0]
            else f"and {among[best].name} {_percent(rates[best])}, which is within the noise"
        )
        return Choice(among[0], rates, f"{recognised}, {rest}.")
    return Choice(among[place], rates, f"{recognised}, {among[0].name} {_percent(rates[0])}: a gain beyond noise.")


def choose_batch_method(
    photos: FloatArray,
    labels: IntArray,
    n_way: int,
    *,
    methods: Sequence[Method] = ("ridge",),
    centre: FloatArray | None = None,
    alpha: float = 2.0,
    draws: int = 40,
    seed: int = 0,
) -> BatchChoice:
    """On batches drawn from a person's own labelled photos, unequally shared out: together only where that helps.

    Each draw takes half of every label's photos (one at least, ten at most) as examples and, of the others, a batch in
    Dirichlet(alpha) shares. Batches are smaller than real ones, and examples fewer, so what helps here is no promise of
    as much elsewhere, but what hurts here is not used.

    Args:
        photos: (n, dim), raw embeddings: the examples, and whatever else is labelled.
        labels: (n,), integers in [0, n_way), none without a photo.
        methods: of `transductive.METHODS`, from the one to prefer on.

    Raises:
        ConfigError: no methods, fewer than two draws, or alpha not above 0.
        DataError: no labels.
    """
    if not methods or draws < 2 or not alpha > 0:
        raise ConfigError(f"{len(methods)} methods, {draws} draws, alpha {alpha}: use 1, 2 and above 0 at least")
    if n_way < 1:
        raise DataError("there are no labels: add one with at least one example photo")
    if n_way < 2:
        return BatchChoice(None, None, "One label has nothing to be told apart from, together or not.")
    if np.bincount(labels, minlength=n_way).min() < 2:
        return BatchChoice(
            PRIOR_BATCH_METHOD,
            None,
            "A label with a single photo leaves none for a batch: answering together is what does best elsewhere.",
        )
    rng = np.random.default_rng(seed)
    accuracies = np.array([_try_batch(photos, labels, n_way, methods, centre, alpha, rng) for _ in range(draws)]).T
    place = _walk(accuracies)
    gains = accuracies.mean(axis=1) - accuracies[0].mean()
    if place == 0:
        best = float(gains[1:].max())
        return BatchChoice(
            None,
            best,
            f"On {draws} batches of these photos answering together gives {_points(best)}: not beyond noise.",
        )
    gain = float(gains[place])
    return BatchChoice(
        methods[place - 1], gain, f"On {draws} batches of these photos answering together gives {_points(gain)}."
    )


def _try_batch(
    photos: FloatArray,
    labels: IntArray,
    n_way: int,
    methods: Sequence[Method],
    centre: FloatArray | None,
    alpha: float,
    rng: np.random.Generator,
) -> list[float]:
    """Accuracy of each photo by itself, then of each method, on one batch."""
    support, batch = [], []
    shares = rng.dirichlet(np.full(n_way, alpha))
    for label in range(n_way):
        own = rng.permutation(np.flatnonzero(labels == label))
        examples = min(max(1, len(own) // 2), 10)
        rest = own[examples:]
        support += list(own[:examples])
        # The largest share takes all that is left of its label, the others in proportion, one at least.
        batch += list(rest[: max(1, round(len(rest) * shares[label] / shares.max()))])
    model = fit(photos[support], labels[support], n_way, centre=centre)
    prepared, truth = model.prepare(photos[batch]), labels[batch]
    answers = [model.similarities(prepared)]
    answers += [METHODS[name](prepared, model.support, model.support_labels, n_way) for name in methods]
    return [float((similarities.argmax(axis=1) == truth).mean()) for similarities in answers]


def _walk(outcomes: npt.NDArray[np.float64]) -> int:
    """(candidates, trials), paired -> the last candidate that beat the one chosen before it beyond noise."""
    chosen = 0
    for place in range(1, len(outcomes)):
        gains = outcomes[place] - outcomes[chosen]
        error = float(gains.std(ddof=1)) / len(gains) ** 0.5 if len(gains) > 1 else float("inf")
        if float(gains.mean()) > max(NOISE * error, 1e-9):
            chosen = place
    return chosen


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(gain: float) -> str:
    return f"{100 * gain:+.1f} points"
