import numpy as np
import pytest

from fewshot_engine import text
from fewshot_engine.errors import DataError
from fewshot_engine.known_classes import KnownClasses
from fewshot_engine.sentences import encode_sentences
from fewshot_engine.text import (
    Concepts,
    TextHealth,
    TextLabel,
    TextPrototypes,
    fuse_with_shots,
    fusion_weight,
    load_concepts,
    refined_logits,
    text_logits,
    text_prototypes,
    zero_shot,
)

NAMES = ("tabby cat", "golden retriever", "sports car", "teapot", "oak tree")


@pytest.fixture(scope="module")
def concepts():
    """Five names, and a classifier that sees each of them in a direction of its own."""
    weights = np.eye(5, 6, dtype=np.float32)[None]
    return Concepts(NAMES, encode_sentences(NAMES), KnownClasses(weights, np.zeros((1, 5), dtype=np.float32)))


def by_hand(mixtures, likely):
    """Prototypes of given mixtures, and a classifier that says these probabilities whatever it sees."""
    mixtures = np.array(mixtures)
    names = tuple("abcdefg"[: len(likely)])
    biases = np.log(likely, dtype=np.float32)[None] * text.NAME_TEMPERATURE
    known = KnownClasses(np.zeros((1, len(names), 4), dtype=np.float32), biases)
    concepts = Concepts(names, np.eye(len(names), dtype=np.float32), known)
    labels = tuple(TextLabel(f"label {row}") for row in range(len(mixtures)))
    return TextPrototypes(labels, concepts, mixtures, (TextHealth((("a", 1.0),), 1.0, None),) * len(labels))


def test_a_labels_probability_is_summed_over_the_names():
    prototypes = by_hand([[1, 0, 0], [0, 0.5, 0.5]], likely=[0.5, 0.3, 0.2])
    answers = zero_shot(np.ones((1, 4)), prototypes)
    first, second = 0.5, (0.5 * 0.3 + 0.5 * 0.2) / np.sqrt(0.5) ** text.NARROWNESS
    odds = (first / second) ** (1 / text.TEXT_TEMPERATURE)
    assert answers.labels.tolist() == [[0, 1]]
    np.testing.assert_allclose(answers.confidences, [[odds / (1 + odds), 1 / (1 + odds)]], rtol=1e-5)
    length = np.sqrt(0.5**2 + 0.3**2 + 0.2**2)
    np.testing.assert_allclose(answers.distances, [[1 - first / length, 1 - 0.25 / length / np.sqrt(0.5)]], rtol=1e-5)


def test_words_find_their_photos(concepts):
    labels = [TextLabel("automobile"), TextLabel("kitten"), TextLabel("pot", "for brewing tea")]
    prototypes = text_prototypes(labels, concepts)
    cat, _, car, pot, _ = np.eye(5, 6, dtype=np.float32)
    answers = zero_shot(np.stack([pot, car, cat]), prototypes)
    assert answers.labels[:, 0].tolist() == [2, 0, 1]
    assert [health.nearest[0][0] for health in prototypes.health] == ["sports car", "tabby cat", "teapot"]
    assert (answers.confidences[:, 0] > 0.9).all()
    assert (np.diff(answers.confidences, axis=1) <= 0).all()


def test_neither_the_order_of_labels_nor_the_length_of_an_embedding_matters(concepts):
    embeddings = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    labels = [TextLabel("automobile"), TextLabel("kitten"), TextLabel("forest")]
    one = text_logits(embeddings, text_prototypes(labels, concepts))
    turned = text_logits(7 * embeddings, text_prototypes(labels[::-1], concepts))
    np.testing.assert_allclose(one, turned[:, ::-1], rtol=1e-4)


def test_no_photos_and_a_single_label_are_answered(concepts):
    prototypes = text_prototypes([TextLabel("kitten")], concepts)
    assert zero_shot(np.empty((0, 6), np.float32), prototypes).labels.shape == (0, 1)
    assert zero_shot(np.ones((2, 6), np.float32), prototypes).confidences.tolist() == [[1], [1]]
    assert not prototypes.is_weak


def test_a_label_that_no_name_is_near_to_is_said_so(concepts):
    prototypes = text_prototypes([TextLabel("tabby cat"), TextLabel("eigenvalue")], concepts)
    assert prototypes.health[0].expected > prototypes.health[1].expected
    (doubt,) = prototypes.doubts()
    assert "near to eigenvalue" in doubt
    assert "tabby" not in doubt.split("(")[0]


def test_labels_that_the_names_cannot_part_are_a_weak_guide(concepts):
    labels = [TextLabel(f"{fat} fat oat yoghurt") for fat in ("low", "medium", "high", "full")]
    prototypes = text_prototypes(labels, concepts)
    assert prototypes.is_weak
    assert prototypes.expected_accuracy < 0.45
    said = " ".join(prototypes.doubts())
    assert "weak guide" in said
    assert "low fat oat yoghurt and" in said


def test_labels_need_a_name_of_their_own(concepts):
    with pytest.raises(DataError, match="there are no labels"):
        text_prototypes([], concepts)
    with pytest.raises(DataError, match="two labels are called cat"):
        text_prototypes([TextLabel("cat"), TextLabel("cat", "with a hat")], concepts)
    with pytest.raises(DataError, match="no name"):
        TextLabel.parse(": only a description")


def test_a_label_is_a_name_and_what_follows_the_first_colon():
    assert TextLabel.parse("beret: hat: flat") == TextLabel("beret", "hat: flat")
    assert TextLabel.parse(" beret ").sentence == "beret"
    assert TextLabel("beret", "a hat").sentence == "beret: a hat"


def test_photos_that_look_alike_agree():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], 20)
    photos = np.eye(3)[truth] + rng.normal(scale=0.1, size=(60, 3))
    logits = np.eye(3)[truth] * 0.8 + rng.normal(size=(60, 3))
    alone = (logits.argmax(axis=1) == truth).mean()
    assert alone < 0.75
    assert (refined_logits(logits, photos).argmax(axis=1) == truth).mean() > 0.95


def test_a_batch_of_few_photos_is_left_alone():
    logits = np.random.default_rng(0).normal(size=(14, 3))
    assert refined_logits(logits, np.ones((14, 2))) is logits


def test_names_and_examples_multiply_their_evidence():
    text_says, shots_say = np.log([[0.8, 0.2]]), np.log([[0.4, 0.6]])
    odds = 0.4 / 0.6 * 4**0.5
    np.testing.assert_allclose(fuse_with_shots(text_says, shots_say, 0.5), [[odds / (1 + odds), 1 / (1 + odds)]])
    np.testing.assert_allclose(fuse_with_shots(text_says, shots_say, 0.0), [[0.4, 0.6]])


def test_shots_take_over_from_the_names():
    nothing = np.empty((0, 3)), np.empty((0, 3)), np.empty(0, dtype=np.int64)
    weights = [fusion_weight(*nothing, shots=shots) for shots in (1, 2, 5, 10)]
    assert weights[0] == text.FUSION_WEIGHT
    assert weights == sorted(weights, reverse=True)


def test_the_examples_decide_how_far_the_names_are_to_be_trusted():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 10)
    shots = np.eye(3)[labels] + rng.normal(scale=0.7, size=(30, 3))
    good, bad = 2 * np.eye(3)[labels], 2 * np.eye(3)[(labels + 1) % 3]
    noise = rng.normal(scale=0.5, size=(30, 3))
    prior = text.FUSION_WEIGHT * 10**-text.FUSION_DECAY
    assert fusion_weight(good + noise, shots, labels, shots=10) > 2 * prior
    assert fusion_weight(bad + noise, shots, labels, shots=10) == 0


def test_an_encoder_without_a_classifier_knows_no_names(tmp_path):
    with pytest.raises(DataError, match="resnet12 does not know names"):
        load_concepts(tmp_path, "resnet12")


def test_the_names_of_imagenet_are_read_once(exported):
    concepts = load_concepts(exported)
    assert len(concepts.names) == 1000
    assert "goldfish" in concepts.names
    (kept,) = exported.glob("imagenet-names-*.npz")
    before = kept.stat().st_mtime_ns
    assert load_concepts(exported).names == concepts.names
    assert kept.stat().st_mtime_ns == before
