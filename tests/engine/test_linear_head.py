import numpy as np
import pytest
from scipy.optimize import minimize

from fewshot_engine.errors import ConfigError, DataError, EmptyClassError
from fewshot_engine.inference import classify, fit
from fewshot_engine.linear_head import (
    STRENGTHS,
    LinearHead,
    _simplest_within_noise,
    _temperature,
    advise,
    classify_by_head,
    fit_linear_head,
)
from fewshot_engine.prototypes import l2_normalise
from fewshot_engine.selection import candidates, choose_rule


def photos(n_way, shot, *, dim=24, noise=0.8, seed=0):
    directions = np.random.default_rng(99).normal(size=(n_way, dim))
    labels = np.repeat(np.arange(n_way), shot)
    return directions[labels] + noise * np.random.default_rng(seed).normal(size=(len(labels), dim)), labels


def stripes(shot, *, seed=0):
    """Three labels side by side across a direction in which each of them is wide: their prototypes lie close."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(3), shot)
    rows, along = rng.normal(scale=0.1, size=(len(labels), 24)), rng.normal(size=len(labels))
    rows[:, :3] += np.stack([np.full(len(labels), 2.0), along, along + (labels - 1) / 2], axis=1)
    return rows.astype(np.float32), labels


def test_it_recognises_new_photos_and_expects_as_much():
    head = fit_linear_head(*photos(5, 40, noise=1.5), 5)
    queries, truth = photos(5, 60, noise=1.5, seed=1)
    right = (head.probabilities(queries).argmax(axis=1) == truth).mean()
    assert right > 0.85
    assert head.expected_accuracy == pytest.approx(right, abs=0.06)
    assert head.strength in STRENGTHS
    np.testing.assert_allclose(head.probabilities(queries).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(("n_way", "shot"), [(2, 6), (3, 4)])
def test_its_loss_is_the_least_of_the_definition(n_way, shot):
    embeddings, labels = photos(n_way, shot, dim=5)
    head = fit_linear_head(embeddings, labels, n_way, strength=2.0)
    unit = l2_normalise(embeddings)

    def loss(flat):
        """C x the sum of log-losses + |W|² / 2, biases free."""
        weights, biases = flat[: n_way * 5].reshape(n_way, 5), flat[n_way * 5 :]
        logits = unit @ weights.T + biases
        log_loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
        # scikit-learn has one weight vector for two labels: (w, -w) / 2 have half its squared length
        return 2.0 * log_loss.sum() + (weights**2).sum() * (1 if n_way == 2 else 0.5)

    least = minimize(loss, np.zeros(n_way * 6), method="BFGS").fun
    found = loss(np.concatenate([head.weights.ravel(), head.biases]).astype(float))
    assert found == pytest.approx(least, rel=1e-3)


def test_fewer_photos_than_dimensions_give_the_same_head_in_their_span():
    embeddings, labels = photos(3, 4, dim=6)
    wide = np.concatenate([embeddings, np.zeros((12, 50))], axis=1)  # 12 photos of 56 numbers
    narrow_head, wide_head = (fit_linear_head(e, labels, 3, strength=1.0) for e in (embeddings, wide))
    np.testing.assert_allclose(wide_head.weights[:, :6], narrow_head.weights, atol=2e-3)
    np.testing.assert_allclose(wide_head.weights[:, 6:], 0, atol=1e-6)


def test_lengths_and_the_order_of_examples_do_not_matter():
    embeddings, labels = photos(4, 6)
    order = np.random.default_rng(0).permutation(len(labels))
    once = fit_linear_head(embeddings, labels, 4, strength=1.0)
    again = fit_linear_head(7 * embeddings[order], labels[order], 4, strength=1.0)
    np.testing.assert_allclose(once.weights, again.weights, atol=1e-3)


def test_a_label_with_a_few_examples_is_not_drowned_by_one_with_many():
    embeddings, labels = photos(2, 60, noise=2.0)
    kept = np.concatenate([np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)[:6]])
    head = fit_linear_head(embeddings[kept], labels[kept], 2, strength=1.0)
    queries, truth = photos(2, 100, noise=2.0, seed=2)
    answers = head.probabilities(queries).argmax(axis=1)
    assert abs((answers[truth == 0] == 0).mean() - (answers[truth == 1] == 1).mean()) < 0.25


def test_the_stronger_regularisation_wins_unless_the_gain_is_beyond_noise():
    rng = np.random.default_rng(0)
    base = rng.uniform(0, 1, size=200)
    noise = 0.2 * rng.normal(size=200)
    assert _simplest_within_noise(np.stack([base + noise - noise.mean() + 0.005, base])) == 0
    assert _simplest_within_noise(np.stack([base + noise - noise.mean() + 0.1, base])) == 1


def test_it_tells_apart_what_no_prototypes_do_and_is_as_sure_as_it_is_right():
    (support, labels), (queries, truth) = stripes(120), stripes(300, seed=1)
    rule = choose_rule(candidates({"whole": support}, labels), labels, 3).candidate.rule
    model = fit(support, labels, 3, rule=rule)
    by_prototypes = classify(model, queries, top_k=3)
    answers = classify_by_head(fit_linear_head(support, labels, 3), model, queries)
    right = (answers.labels[:, 0] == truth).mean()
    assert right > 0.9 > 0.8 > (by_prototypes.labels[:, 0] == truth).mean()
    assert answers.confidences[:, 0].mean() == pytest.approx(right, abs=0.03)
    np.testing.assert_array_equal(answers.stranger, by_prototypes.stranger)
    for label in range(3):
        distances = [one.distances[one.labels == label] for one in (answers, by_prototypes)]
        np.testing.assert_array_equal(*distances)
    assert (answers.nearest == -1).all()


def test_its_answers_by_hand():
    support = np.array([[1, 0], [0, 1]], dtype=np.float32)
    model = fit(support, np.array([0, 1]), 2)
    weights = np.array([[0, np.log(3)], [0, 0]], dtype=np.float32)
    head = LinearHead(weights, np.zeros(2, np.float32), strength=1.0, temperature=0.5, expected_accuracy=None)
    query = np.array([[0.0, 7.0]])  # in the direction of prototype 1, which is label 0 to this head
    answers = classify_by_head(head, model, query, top_k=1)
    assert (answers.labels.tolist(), answers.confidences[0, 0]) == ([[0]], pytest.approx(9 / 10))  # 3² : 1
    assert answers.distances[0, 0] == pytest.approx(1 - model.similarities(model.prepare(query))[0, 0])
    assert answers.distances[0, 0] > classify(model, query).distances[0, 0]
    assert len(classify_by_head(head, model, query[:0]).labels) == 0


def test_the_temperature_makes_confidence_the_hit_rate():
    logits = np.tile([2.0, 0.0], (4000, 1))
    labels = np.repeat([0, 1], [3000, 1000])  # three of four are right: the logits' difference should be log 3
    assert _temperature(logits, labels) == pytest.approx(2 / np.log(3), rel=0.02)
    assert _temperature(50 * np.eye(2), np.array([0, 1])) == pytest.approx(1, rel=0.03)  # two hits promise nothing
    assert _temperature(np.tile([2.0, 0.0], (20, 1)), np.zeros(20, dtype=int)) > 0.3


def test_near_copies_of_an_example_are_held_out_with_it():
    """Labels without a difference, each photo five times: whoever held out one of the five would expect to know it."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.tile([0, 1], 20), 5)
    embeddings = np.repeat(rng.normal(size=(40, 24)), 5, axis=0) + 1e-3 * rng.normal(size=(200, 24))
    assert fit_linear_head(embeddings, labels, 2, strength=100.0).expected_accuracy < 0.75


def test_with_one_example_a_label_nothing_is_expected():
    for examples in (photos(3, 1), photos(3, 4, noise=0.0)):
        head = fit_linear_head(*examples, 3)
        assert (head.expected_accuracy, head.strength, head.temperature) == (None, 1.0, 1.0)


def test_advice_names_the_numbers():
    few = advise({"hat": 250, "shoe": 7})
    assert few.classifier == "prototypes" and "shoe has 7 examples" in few.reason and "100" in few.reason
    assert "shoe has 1 example:" in advise({"hat": 3, "shoe": 1}).reason
    assert advise({"hat": 100, "shoe": 100}).classifier == "prototypes"
    many = advise({"hat": 101, "shoe": 300})
    assert many.classifier == "linear head" and "2 labels has 101 examples" in many.reason
    assert advise({"hat": 500}).classifier == "prototypes"
    with pytest.raises(DataError, match="no labels"):
        advise({})


def test_mistakes_are_named():
    embeddings, labels = photos(2, 3)
    with pytest.raises(DataError, match="needs 2; there are 1"):
        fit_linear_head(embeddings, np.zeros(6, dtype=int), 1)
    with pytest.raises(EmptyClassError, match="label 2 of 3"):
        fit_linear_head(embeddings, labels, 3)
    with pytest.raises(ConfigError, match="strength is 0"):
        fit_linear_head(embeddings, labels, 2, strength=0)
    with pytest.raises(ValueError, match="belong together"):
        fit_linear_head(embeddings, labels[:2], 2)
