import numpy as np
import pytest

from fewshot_engine import inference
from fewshot_engine.errors import CheckpointError, DataError, EmptyClassError
from fewshot_engine.inference import (
    TOGETHER_TEMPERATURE,
    PrototypeModel,
    classify,
    classify_batch,
    fit,
    mean_embedding,
    verdict,
)
from fewshot_engine.prototypes import Rule, l2_normalise
from fewshot_engine.transductive import METHODS


def photos(n_way, shot, *, dim=64, noise=0.7, seed=0, first=0):
    """Embeddings around `n_way` directions, numbered from `first` on; (n_way * shot, dim) and their labels."""
    directions = np.random.default_rng(99).normal(size=(40, dim))[first : first + n_way]
    labels = np.repeat(np.arange(n_way), shot)
    noises = np.random.default_rng(seed).normal(size=(len(labels), dim)) * noise
    return (directions[labels] + noises).astype(np.float32), labels


def test_answers_by_hand():
    # Means of two examples, nothing in common taken off: the prototypes are the examples.
    model = fit(np.array([[2.0, 0.0], [0.0, 5.0]]), np.array([0, 1]), 2, rule=Rule("cosine", centred=False))
    answers = classify(model, np.array([[3.0, 4.0]]))
    np.testing.assert_array_equal(answers.labels, [[1, 0]])
    np.testing.assert_allclose(answers.distances, [[0.2, 0.4]], atol=1e-6)
    odds = np.exp((0.8 - 0.6) / model.temperature)
    np.testing.assert_allclose(answers.confidences, [[odds / (1 + odds), 1 / (1 + odds)]], rtol=1e-4)
    np.testing.assert_array_equal(answers.nearest, [[1, -1, -1, 0, -1, -1]])
    np.testing.assert_allclose(answers.nearest_similarities, [[0.8, 0, 0, 0.6, 0, 0]], atol=1e-6)


def test_the_default_answers_by_hand():
    # Two orthogonal examples: half their mean of 0.7 is taken off, and ridge prototypes are opposite each other.
    model = fit(np.array([[2.0, 0.0], [0.0, 5.0]]), np.array([0, 1]), 2)
    np.testing.assert_allclose(model.common, [0.35, 0.35], atol=1e-6)
    np.testing.assert_allclose(model.prototypes, [[0.5**0.5, -(0.5**0.5)], [-(0.5**0.5), 0.5**0.5]], atol=1e-6)
    cosine = (0.45 - 0.25) / 2**0.5 / np.hypot(0.25, 0.45)  # (0.6, 0.8) less what is common, to (-1, 1)
    np.testing.assert_allclose(classify(model, np.array([[3.0, 4.0]])).distances, [[1 - cosine, 1 + cosine]], atol=1e-5)


def test_squared_euclidean_distance_by_hand():
    support = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    model = fit(support, np.array([0, 0, 1]), 2, rule=Rule("euclidean", centred=False))
    distances = classify(model, np.array([[0.8, 0.6]])).distances
    np.testing.assert_allclose(distances, [[0.5 * 0.2**2, 0.5 * (0.8**2 + 0.4**2)]], atol=1e-6)  # to (0.8, 0.4), (0, 1)


def test_several_prototypes_know_a_label_of_two_kinds():
    both, other = photos(2, 6)[0], photos(1, 6, first=5)[0]
    support, labels = np.concatenate([both, other]), np.repeat([0, 0, 1], 6)
    model = fit(support, labels, 2, rule=Rule("cosine", prototypes=2))
    np.testing.assert_array_equal(model.prototype_labels, [0, 0, 1, 1])
    answers = classify(model, photos(2, 10, seed=4)[0])
    assert (answers.labels[:, 0] == 0).all()
    one = classify(fit(support, labels, 2, rule=Rule("cosine")), photos(2, 10, seed=4)[0])
    assert answers.distances[:, 0].mean() < one.distances[:, 0].mean()


def test_a_batch_is_answered_together_and_says_what_changed():
    support, labels = photos(4, 1, noise=1.6)
    queries, truth = photos(4, 15, noise=1.6, seed=3)
    model = fit(support, labels, 4)
    alone = classify(model, queries)
    gains = []
    for method in METHODS:
        together, changed = classify_batch(model, queries, method=method)
        np.testing.assert_array_equal(changed, together.labels[:, 0] != alone.labels[:, 0])
        gains.append((together.labels[:, 0] == truth).mean() - (alone.labels[:, 0] == truth).mean())
        assert np.isfinite(together.confidences).all()
    assert gains[0] > 0.03
    sharpness = np.log(together.confidences[:, 0] / together.confidences[:, 1])
    gap = together.distances[:, 1] - together.distances[:, 0]
    np.testing.assert_allclose(sharpness, gap / (TOGETHER_TEMPERATURE * model.temperature), rtol=1e-3, atol=1e-3)
    nothing, changed = classify_batch(model, queries[:0])
    assert nothing.labels.shape == (0, 3) and changed.shape == (0,)


def test_the_order_of_the_support_does_not_matter():
    support, labels = photos(5, 4, noise=1.5)
    queries = photos(5, 6, seed=3)[0]
    order = np.random.default_rng(0).permutation(len(labels))
    once, again = (classify(fit(support[o], labels[o], 5), queries) for o in (np.arange(len(labels)), order))
    np.testing.assert_array_equal(once.labels, again.labels)
    np.testing.assert_allclose(once.confidences, again.confidences, atol=1e-4)
    np.testing.assert_allclose(once.stranger, again.stranger, atol=1e-4)
    np.testing.assert_array_equal(once.nearest[:, 0], order[again.nearest[:, 0]])


@pytest.mark.parametrize(("n_way", "shot"), [(1, 1), (1, 5), (2, 1), (2, 3), (5, 1), (5, 5), (20, 2)])
def test_every_size_of_label_set_gives_probabilities(n_way, shot):
    model = fit(*photos(n_way, shot), n_way)
    answers = classify(model, photos(n_way, 3, seed=5)[0], top_k=50)
    assert answers.labels.shape == (3 * n_way, n_way)
    np.testing.assert_allclose(answers.confidences.sum(axis=1), 1, atol=1e-5)
    assert ((answers.stranger > 0) & (answers.stranger < 1)).all()
    assert (answers.labels[:, 0] == np.repeat(np.arange(n_way), 3)).mean() > 0.9


def test_strangers_score_above_known_photos():
    for n_way, shot in ((1, 1), (1, 4), (5, 1), (5, 5)):
        model = fit(*photos(n_way, shot), n_way)
        known = classify(model, photos(n_way, 10, seed=6)[0]).stranger
        strange = classify(model, photos(n_way, 10, seed=7, first=20)[0]).stranger
        assert np.quantile(strange, 0.1) > np.quantile(known, 0.9)
        if shot > 1:  # a single example cannot say how far its kind spreads: the prior is careful
            assert np.median(strange) > 0.5 > np.median(known)


@pytest.mark.parametrize("make", [np.zeros, np.ones])
@pytest.mark.parametrize(("n_way", "shot"), [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_identical_photos_and_zeros_do_not_crash(make, n_way, shot):
    support = make((n_way * shot, 8))
    answers = classify(
        fit(support, np.repeat(np.arange(n_way), shot), n_way), np.concatenate([support, np.zeros((1, 8))])
    )
    for values in (answers.confidences, answers.distances, answers.stranger, answers.nearest_similarities):
        assert np.isfinite(values).all()


def test_a_near_copy_does_not_vouch_for_an_example():
    support, labels = photos(2, 1)
    doubled = np.concatenate([support, support])
    model = fit(doubled, np.concatenate([labels, labels]), 2)
    assert model.expected_accuracy is None
    assert model.per_label[0].examples == 2
    assert model.per_label[0].expected is None


def test_health_names_the_outlier_and_the_confusion():
    support, labels = photos(3, 4, noise=0.3)
    support[1] = photos(3, 4, noise=0.3, seed=8)[0][8]  # a photo of label 2 filed under label 0
    health = fit(support, labels, 3).per_label
    assert (health[0].outlier, health[0].confused_with, health[0].expected) == (1, 2, 0.75)
    assert (health[1].outlier, health[1].confused_with, health[1].expected) == (None, None, 1.0)


def test_a_negative_raises_the_stranger_score_of_photos_like_it():
    support, labels = photos(3, 3)
    negatives = photos(1, 2, first=20)[0]
    like_negative, known = photos(1, 5, first=20, seed=9)[0], photos(3, 5, seed=9)[0]
    without, with_them = fit(support, labels, 3), fit(support, labels, 3, negatives=negatives)
    assert (classify(with_them, like_negative).stranger > classify(without, like_negative).stranger).all()
    assert np.median(classify(with_them, known).stranger) < 0.5


def test_a_centre_is_subtracted_from_support_and_queries():
    support, labels = photos(3, 3)
    shifted = l2_normalise(support) + 0.5
    model = fit(shifted, labels, 3, centre=mean_embedding(shifted))
    answers = classify(model, shifted)
    np.testing.assert_array_equal(answers.labels[:, 0], labels)


def test_no_query_gives_empty_answers():
    answers = classify(fit(*photos(3, 2), 3), np.empty((0, 64), dtype=np.float32))
    assert answers.labels.shape == (0, 3)
    assert answers.stranger.shape == (0,)


def test_bytes_bring_the_same_model_back():
    support, labels = photos(4, 3)
    for options in ({}, {"negatives": support[:2], "centre": support.mean(0)}):
        model = fit(support, labels, 4, **options)
        again = PrototypeModel.from_bytes(model.to_bytes())
        assert again.per_label == model.per_label
        assert again.stranger_weights == model.stranger_weights
        once, twice = classify(model, support), classify(again, support)
        np.testing.assert_array_equal(once.labels, twice.labels)
        np.testing.assert_allclose(once.stranger, twice.stranger, rtol=1e-5)  # where bytes lie in memory rounds sums
        np.testing.assert_allclose(once.confidences, twice.confidences, rtol=1e-5)


@pytest.mark.parametrize("data", [b"", b"no tensors", b"\x80\x04pickle", b"\x02" + bytes(7) + b"{}"])
def test_other_bytes_are_no_model(data):
    with pytest.raises(CheckpointError):
        PrototypeModel.from_bytes(data)


def test_mistakes_are_named():
    with pytest.raises(DataError, match="no labels"):
        fit(np.empty((0, 4)), np.empty(0, dtype=int), 0)
    with pytest.raises(EmptyClassError):
        fit(np.eye(2), np.array([0, 0]), 2)
    with pytest.raises(ValueError, match="not finite"):
        fit(np.full((1, 2), np.nan), np.array([0]), 1)


def test_verdicts():
    assert verdict(0.9, 0.1) == "known"
    assert verdict(0.59, 0.1) == "unsure"
    assert verdict(0.9, 0.51) == "none"
    assert verdict(0.9, 0.51, reject_above=0.6) == "known"
    assert verdict(0.9, 0.1, unsure_below=0.95) == "unsure"


def test_many_examples_are_calibrated_on_a_part_of_them_and_named_by_their_own_rows(monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(3), [40, 5, 5])
    kinds = 3 * rng.standard_normal((3, 16))
    support = kinds[labels] + rng.standard_normal((50, 16))
    support[42] = kinds[0]  # an outlier of label 1, which has all of its examples asked
    monkeypatch.setattr(inference, "MOST_LEFT_OUT", 20)
    model = fit(support, labels, 3)
    assert [health.examples for health in model.per_label] == [40, 5, 5]
    assert model.per_label[1].outlier == 42
    assert len(inference.left_out(support, labels, 3).labels) == 20
    np.testing.assert_allclose(model.prototypes, fit(support, labels, 3).prototypes)


def test_a_large_batch_is_dealt_out_to_several(monkeypatch):
    rng = np.random.default_rng(0)
    kinds, labels = 3 * rng.standard_normal((3, 16)), np.repeat(np.arange(3), 2)
    model = fit(kinds[labels] + rng.standard_normal((6, 16)), labels, 3)
    truth = rng.permutation(np.repeat(np.arange(3), 7))
    queries = kinds[truth] + rng.standard_normal((21, 16))
    monkeypatch.setattr(inference, "MOST_TOGETHER", 10)
    answers, _ = classify_batch(model, queries)
    for first in range(3):
        part, _ = classify_batch(model, queries[first::3])
        np.testing.assert_array_equal(answers.labels[first::3], part.labels)
    assert classify_batch(model, queries[:0])[0].labels.shape == (0, 3)


def test_neighbours_are_the_nearest_unlabelled_photos_and_no_copies():
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((30, 6))
    photos = np.concatenate([pool[:2], rng.standard_normal((1, 6))])
    centre = inference.mean_embedding(pool)
    there, here = (l2_normalise(l2_normalise(rows) - centre) for rows in (pool, photos))
    found = inference.neighbours_in(pool, photos, centre)
    for row in range(3):
        order = [place for place in np.argsort(-(there @ here[row])) if there[place] @ here[row] <= 0.98]
        np.testing.assert_allclose(found[row], there[order[: inference.NEIGHBOURS]].mean(axis=0), atol=1e-5)
    assert not inference.neighbours_in(photos[:1], photos[:1], np.zeros(6)).any()


def test_neighbours_help_where_one_example_is_not_enough():
    rng = np.random.default_rng(0)
    hits = {"alone": [], "with neighbours": []}
    for _ in range(20):
        truth = np.repeat(np.arange(4), 20)
        kinds = rng.standard_normal((4, 30))
        pool = kinds[truth] + 1.2 * rng.standard_normal((80, 30))
        support, labels = kinds + 1.2 * rng.standard_normal((4, 30)), np.arange(4)
        centre = inference.mean_embedding(pool)
        near = inference.neighbours_in(pool, support, centre)
        for name, likeness in (("alone", None), ("with neighbours", near)):
            model = fit(support, labels, 4, centre=centre, likeness=likeness)
            hits[name].append((classify(model, pool).labels[:, 0] == truth).mean())
    assert np.mean(hits["with neighbours"]) > np.mean(hits["alone"]) + 0.03
