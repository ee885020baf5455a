"""Photos sorted by the names of labels alone, without CLIP; and names and example photos together.

A photo is known by how likely each of ImageNet's 1,000 names is for it, a label by which of these names it resembles,
and the probability of a label is summed over the names, as in indirect attribute prediction (Lampert et al. 2014).
ConSE (Norouzi et al. 2013) turns the sum round: it moves the photo among the names' text embeddings and compares there.
On 15 label sets (clothing, groceries, fruit and vegetables, with and without descriptions; miniImageNet's classes with
all, half and none of their own names among the 1,000) the sum over names is right for 59 % of photos at 5 ways and
ConSE for 52 %. It is better on all but fruit (35 and 39 %).

What a label resembles is the mean of two cosines: between its text and each name, and between the weights that the
classifier would have for it and those that it has. These weights are a ridge regression from texts to weights, learned
on the 1,000 pairs at hand (as Elhoseiny et al. 2013 write a classifier from a description).

Good for everyday things, near chance for fine distinctions: `TextPrototypes.doubts` says so, and examples take over.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewshot_engine.apart import answer, run_apart
from fewshot_engine.checkpoints import write_atomically
from fewshot_engine.config import ENCODERS, ENGINE_VERSION
from fewshot_engine.errors import DataError
from fewshot_engine.known_classes import CLASSIFIERS, KnownClasses, load_known_classes
from fewshot_engine.prototypes import FloatArray, IntArray, l2_normalise
from fewshot_engine.sentences import encode_sentences, model_file

Float32Array = npt.NDArray[np.float32]

# Chosen on the label sets above, by the mean accuracy at 5 ways; each is flat around its value.
NAME_TEMPERATURE = 1.5  # of the classifier's logits: its second thoughts count, where a label is none of the 1,000
RIDGE = 10.0
VISUAL_SHARE = 0.5  # of the learned weights' cosine; the rest is the texts'
RESEMBLANCE_TEMPERATURE = 0.07
NARROWNESS = 0.25  # power of a mixture's length by which a label that is one name itself yields to those that are many
TEXT_TEMPERATURE = 0.6  # of the logarithms of the sums: confidence is then right on average; on fruit 0.28 too high
STRANGER_WEIGHTS = (-3.84, -0.61)  # bias, and weight of the largest sum's logarithm; a third are taken to be strangers
EXPECTED_WEIGHTS = (-2.8, 1.4, 3.28)  # bias, cosine to the nearest name, how well the names part a label from others

FAR = 0.45  # cosine to the nearest name below which a label's answers are little more than guesses
ALIKE = 0.25  # probability of another label, for photos of this one, from which the two are told to be hard to part
NAMED_AT_MOST = 5  # labels in a sentence
NAMES_SHOWN = 3

REFINE_ROUNDS = 5
REFINE_SHARPNESS = 6.0  # of cosines to the batch's own prototypes
REFINE_TEMPERATURE = 3.0  # photos that have agreed are surer than they are right
REFINE_LEAST = 5  # photos a label, below which there is no batch to speak of


@dataclass(frozen=True)
class TextLabel:
    """A label as a person writes it: a short name, and what else there is to say about it."""

    name: str
    description: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise DataError('a label has no name: give each one, as in "beret: a flat round hat"')

    @classmethod
    def parse(cls, text: str) -> TextLabel:
        """From "name" or "name: description"."""
        name, _, description = text.partition(":")
        return cls(name.strip(), description.strip())

    @property
    def sentence(self) -> str:
        return f"{self.name}: {self.description}" if self.description else self.name


@dataclass(frozen=True, eq=False)
class Concepts:
    """What a photo is compared with: the names that a pretrained classifier knows.

    Attributes:
        names: m of them.
        texts: (m, text_dim), embeddings of the names, rows of length 1.
        known: the last layers of the encoder's classifiers.
    """

    names: tuple[str, ...]
    texts: Float32Array
    known: KnownClasses

    def probabilities(self, embeddings: FloatArray) -> FloatArray:
        """How likely each name is for each photo, by the classifiers' mean logits: (n, b * dim) -> (n, m)."""
        return _softmax(self.known.logits(embeddings) / NAME_TEMPERATURE)

    def text_cosines(self, texts: FloatArray) -> FloatArray:
        """Of each text with each name, both centred by the names' mean: (k, text_dim) -> (k, m)."""
        return self._centred(texts) @ self._centred(self.texts).T

    def resemblance(self, texts: FloatArray) -> FloatArray:
        """How much each text is like each name, by its words and by the weights they suggest: (k, m), from -1 to 1."""
        names = self._centred(self.texts)
        weights = self.known.weights[0] - self.known.weights[0].mean(axis=0)
        ridge = names.T @ names + np.float32(RIDGE) * np.eye(names.shape[1], dtype=np.float32)
        suggested = self._centred(texts) @ np.linalg.solve(ridge, names.T @ weights)  # (k, dim)
        visual = l2_normalise(suggested) @ l2_normalise(weights).T
        mixed: FloatArray = (1 - VISUAL_SHARE) * self.text_cosines(texts) + VISUAL_SHARE * visual
        return mixed

    def _centred(self, texts: FloatArray) -> FloatArray:
        return l2_normalise(l2_normalise(texts) - self.texts.mean(axis=0))


def load_concepts(cache_dir: Path, encoder: str = "fast") -> Concepts:
    """The 1,000 names of ImageNet with the classifiers of a built-in encoder, kept in `cache_dir` after the first time.

    The first time takes some seconds, for names and classifiers come with torchvision's and torch's files.

    Args:
        encoder: "fast" or "accurate", as in `config.ENCODERS`, or one of their backbones.

    Raises:
        DataError: an encoder without a classifier.
        WeightsMissing: a package with weights is not installed.
    """
    known = load_known_classes(ENCODERS.get(encoder, (encoder,)), cache_dir)
    if known is None:
        raise DataError(
            f"{encoder} does not know names: zero-shot works with {' or '.join(ENCODERS)}, or with the weights that "
            f"come with one of {', '.join(CLASSIFIERS)}"
        )
    path = cache_dir / _cache_name()
    if not path.is_file():
        _make_names(path)
    with np.load(path, allow_pickle=False) as arrays:
        return Concepts(tuple(map(str, arrays["names"])), arrays["texts"], known)


@dataclass(frozen=True)
class TextHealth:
    """What a label's text lets one expect.

    Attributes:
        nearest: the names most like it, best first, with the cosine of their texts, both centred: 1 for the same words,
            0 for two unrelated ones.
        expected: share of its photos that will be recognised, 0 to 1; a coarse guess from how near the names are and
            how well they part this label from the others. Averaged over a label set of a kind that it was not fitted
            to, it is 0.14 off, 0.3 at worst; it cannot know that "apple" is taken for a computer.
        confused_with: index of the label that it is hard to tell from, by their texts; None where there is none.
    """

    nearest: tuple[tuple[str, float], ...]
    expected: float
    confused_with: int | None


@dataclass(frozen=True, eq=False)
class TextPrototypes:
    """Labels as mixtures of the names.

    Attributes:
        mixtures: (n_way, m), rows that sum to 1.
        health: of each label.
    """

    labels: tuple[TextLabel, ...]
    concepts: Concepts
    mixtures: FloatArray
    health: tuple[TextHealth, ...]

    @property
    def n_way(self) -> int:
        return len(self.labels)

    @property
    def chance(self) -> float:
        return 1 / self.n_way

    @property
    def expected_accuracy(self) -> float:
        """Mean of the labels' `expected`."""
        return float(np.mean([health.expected for health in self.health]))

    @property
    def is_weak(self) -> bool:
        """Less than a quarter of the way from guessing to certainty."""
        return self.n_way > 1 and self.expected_accuracy - self.chance < (1 - self.chance) / 4

    def doubts(self) -> tuple[str, ...]:
        """Up to three sentences for people; none where the text is as good as it gets."""
        said = []
        if self.is_weak:
            said.append(
                f"These names alone are a weak guide: about {self.expected_accuracy:.0%} of photos are expected to be "
                f"right, where guessing makes {self.chance:.0%}. Give each label an example photo."
            )
        nearest = [(label.name, *health.nearest[0]) for label, health in zip(self.labels, self.health, strict=True)]
        far = [f"{label} (the nearest is {name}, {cosine:.2f} of 1)" for label, name, cosine in nearest if cosine < FAR]
        if far:
            said.append(
                f"The encoder knows nothing by name that is near to {_listed(far)}. "
                "A description in everyday words helps, an example photo more."
            )
        alike = {
            tuple(sorted((row, health.confused_with)))
            for row, health in enumerate(self.health)
            if health.confused_with is not None
        }
        if alike:
            pairs = [" and ".join(self.labels[row].name for row in pair) for pair in sorted(alike)]
            said.append(f"By their texts alone these are hard to tell apart: {_listed(pairs)}.")
        return tuple(said)


def text_prototypes(labels: Sequence[TextLabel], concepts: Concepts) -> TextPrototypes:
    """Each label as a mixture of the names it resembles.

    Raises:
        DataError: no labels, or two of the same name.
        WeightsMissing: the sentence model is not installed.
    """
    if not labels:
        raise DataError("there are no labels: name at least one")
    names = [label.name for label in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"two labels are called {twice[0]}: names are unique")
    texts = encode_sentences([label.sentence for label in labels])
    mixtures = _softmax(concepts.resemblance(texts) / RESEMBLANCE_TEMPERATURE)
    health = _health(mixtures, concepts.text_cosines(texts), concepts.names)
    return TextPrototypes(tuple(labels), concepts, mixtures, health)


@dataclass(frozen=True, eq=False)
class TextPredictions:
    """Answers to n photos, k labels each, best first; as `inference.Predictions`, as far as text knows it.

    Attributes:
        labels: (n, k).
        confidences: (n, k), the probability of the label given that the photo is one of the labels.
        distances: (n, k), 1 minus the cosine between the photo's and the label's shares of the names, 0 to 1.
        stranger: (n,), the probability that the photo is none of the labels; a weak guess where names are far.
    """

    labels: npt.NDArray[np.int64]
    confidences: Float32Array
    distances: Float32Array
    stranger: Float32Array


def zero_shot(
    embeddings: FloatArray, prototypes: TextPrototypes, *, top_k: int = 3, refine: bool = False
) -> TextPredictions:
    """Answer by the labels' texts alone.

    Args:
        embeddings: (n, dim), of the encoder whose classifiers `prototypes` were made with; n may be 0.
        top_k: labels to give; fewer where there are fewer.
        refine: let photos that look alike agree; see `refined_logits`.
    """
    names = prototypes.concepts.probabilities(embeddings)
    evidence = _evidence(names, prototypes.mixtures)
    logits = evidence / TEXT_TEMPERATURE
    confidences = _softmax(refined_logits(logits, embeddings) if refine else logits)
    distances = 1 - l2_normalise(names) @ l2_normalise(prototypes.mixtures).T
    order = np.argsort(-confidences, axis=1, kind="stable")[:, : max(1, top_k)]
    bias, slope = STRANGER_WEIGHTS
    stranger = _sigmoid(bias + slope * evidence.max(axis=1))
    return TextPredictions(
        labels=order,
        confidences=np.take_along_axis(confidences, order, axis=1).astype(np.float32),
        distances=np.take_along_axis(distances, order, axis=1).astype(np.float32),
        stranger=stranger.astype(np.float32),
    )


def text_logits(embeddings: FloatArray, prototypes: TextPrototypes) -> FloatArray:
    """Calibrated log-odds of the labels, up to a constant for each photo: (n, dim) -> (n, n_way)."""
    return _evidence(prototypes.concepts.probabilities(embeddings), prototypes.mixtures) / TEXT_TEMPERATURE


def refined_logits(logits: FloatArray, embeddings: FloatArray) -> FloatArray:
    """The same after photos that look alike have agreed: soft k-means that begins at the texts' answers.

    A label's prototype is the mean of the batch's photos, weighted by its probability; a photo then listens to its
    text, to the prototype and to how frequent the label is (Ren et al. 2018, with class shares). On eight of the sets
    above, 5 labels and 50 photos, that is 6 points more, balanced or in Dirichlet(2) shares; with 25 photos 4; nothing
    where only two of the labels occur; and where all photos are of one label 12 less. So it is for folders that hold a
    bit of everything, not for a burst of one thing. A batch below 5 photos a label is left alone.

    Args:
        logits: (n, n_way), from `text_logits`.
        embeddings: (n, dim), of any encoder.
    """
    n, n_way = logits.shape
    if n < REFINE_LEAST * n_way:
        return logits
    photos = l2_normalise(embeddings)
    photos = l2_normalise(photos - photos.mean(axis=0))
    refined = logits
    for _ in range(REFINE_ROUNDS):
        shares = _softmax(refined)
        means = l2_normalise(shares.T @ photos)
        refined = logits + REFINE_SHARPNESS * photos @ means.T + np.log(shares.mean(axis=0) + 1 / n)
    return refined / REFINE_TEMPERATURE


FUSION_WEIGHT = 0.5  # of the names beside one example a label; on seven of the sets the best was 0.2 to 1.2
FUSION_DECAY = 0.8  # power of the number of examples a label by which it falls
FUSION_PRIOR_SD = 0.75  # of the weight's logarithm


def fusion_weight(text: FloatArray, left_out: FloatArray, labels: IntArray, *, shots: float) -> float:
    """How much the texts should count beside the examples: from 0.5 at one example a label down to 0.

    The weight under which the examples, each left out in turn, are best recognised by the others and the texts; most
    probable under a prior that falls with the number of examples, and 0 where the texts do not help at all. With one
    example a label nothing can be left out, and the prior decides.

    Args:
        text: (m, n_way), `text_logits` of those examples that have another of their label; m may be 0.
        left_out: (m, n_way), the logarithms of their confidences by the label set without them.
        labels: (m,), integers in [0, n_way).
        shots: mean number of examples a label.
    """
    prior = FUSION_WEIGHT * float(shots**-FUSION_DECAY)
    if not len(labels):
        return prior

    def log_likelihood(weight: float) -> float:
        own = fuse_with_shots(text, left_out, weight)[np.arange(len(labels)), labels]
        return float(np.sum(np.log(np.maximum(own, 1e-12))))

    steps = np.linspace(-3, 1.5, 19)
    posterior = [log_likelihood(prior * np.exp(step)) - (step / FUSION_PRIOR_SD) ** 2 / 2 for step in steps]
    best = prior * float(np.exp(steps[int(np.argmax(posterior))]))
    return best if log_likelihood(best) > log_likelihood(0) else 0.0


def fuse_with_shots(text: FloatArray, shots: FloatArray, weight: float) -> FloatArray:
    """Confidences from both: (n, n_way), rows that sum to 1.

    Names and examples see different things in a photo, so their evidence is multiplied (Hinton 2002). With the accurate
    encoder at 5 ways, on seven of them, names lift one example a label from 75.5 to 79.3 %, two from 84.1 to 85.3 and
    three from 87.4 to 88.0; at five they change nothing. Names of other things cost 5 points at one example, then 1.

    Args:
        text: (n, n_way), `text_logits`.
        shots: (n, n_way), the logarithms of the examples' confidences.
        weight: from `fusion_weight`; at 0 the examples answer alone.
    """
    return _softmax(shots + weight * text)


def _evidence(names: FloatArray, mixtures: FloatArray) -> FloatArray:
    """Logarithms of the sums over names, (n, m), (n_way, m) -> (n, n_way)."""
    sums = names @ mixtures.T / np.linalg.norm(mixtures, axis=1) ** NARROWNESS
    logarithms: FloatArray = np.log(np.maximum(sums, 1e-9))
    return logarithms


def _health(mixtures: FloatArray, cosines: FloatArray, names: Sequence[str]) -> tuple[TextHealth, ...]:
    n_way = len(mixtures)
    shares = mixtures / np.maximum(mixtures.sum(axis=0), 1e-12)  # (n_way, m), of each name among the labels
    taken = mixtures @ shares.T  # (n_way, n_way), what photos of label i give to label j
    apart = taken.diagonal()
    bias, w_near, w_apart = EXPECTED_WEIGHTS
    sure = _sigmoid(bias + w_near * cosines.max(axis=1) + w_apart * apart)
    expected = 1 / n_way + (1 - 1 / n_way) * sure
    order = np.argsort(-cosines, axis=1, kind="stable")[:, :NAMES_SHOWN]
    others = np.where(np.eye(n_way, dtype=bool), 0, taken)
    return tuple(
        TextHealth(
            nearest=tuple((names[name], float(cosines[row, name])) for name in order[row]),
            expected=float(expected[row]),
            confused_with=int(others[row].argmax()) if others[row].max() >= ALIKE else None,
        )
        for row in range(n_way)
    )


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - NAMED_AT_MOST} more" if len(items) > NAMED_AT_MOST else ""
    return ", ".join(items[:NAMED_AT_MOST]) + more


def _cache_name() -> str:
    digest = hashlib.sha256(ENGINE_VERSION.encode())
    with open(model_file(), "rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"imagenet-names-{digest.hexdigest()[:16]}.npz"


def _make_names(path: Path) -> None:
    if "torch" in sys.modules:
        _write_names(path)
    else:
        run_apart("fewshot_engine.text", str(path), what="the names of ImageNet")


def _write_names(path: Path) -> None:
    from torchvision.models import EfficientNet_B0_Weights

    names: list[str] = EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    content = io.BytesIO()
    np.savez(content, names=np.array(names), texts=encode_sentences(names))
    write_atomically(path, content.getvalue())


def _softmax(logits: FloatArray) -> FloatArray:
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
    shares: FloatArray = exponentials / exponentials.sum(axis=1, keepdims=True)
    return shares


def _sigmoid(logits: FloatArray) -> FloatArray:
    probability: FloatArray = 1 / (1 + np.exp(-np.clip(logits, -60, 60)))
    return probability


def _main(path: str) -> None:
    _write_names(Path(path))


if __name__ == "__main__":
    answer(_main)
