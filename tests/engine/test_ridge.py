import numpy as np
import pytest

from fewshot_engine.errors import EmptyClassError
from fewshot_engine.prototypes import l2_normalise
from fewshot_engine.ridge import (
    CENTRE_SHARE,
    ITERATIONS,
    QUERY_WEIGHT,
    RIDGE,
    TEMPERATURE,
    TOGETHER_SHARE,
    answer_together,
    episode_cosines,
    left_out_cosines,
    ridge_prototypes,
    support_centre,
)


def drawn(counts, dim=12, seed=0):
    """Rows of length 1 around one random direction a label, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    return l2_normalise(
        rng.standard_normal((len(counts), dim))[labels] + rng.standard_normal((len(labels), dim))
    ), labels


def slow_prototypes(support, labels, n_way):
    """The primal normal equations, (S'S + ridge) W = S'Y, instead of the dual ones."""
    targets = np.eye(n_way)[labels]
    targets = targets - targets.mean(axis=0)
    weights = np.linalg.solve(support.T @ support + RIDGE * np.eye(support.shape[1]), support.T @ targets)
    return (weights / np.linalg.norm(weights, axis=0)).T


def test_two_orthogonal_examples_give_the_difference_by_hand():
    # Gram is the identity, targets are ±1/2: each prototype is the difference of the two examples, of length 1.
    half = 1 / np.sqrt(2)
    assert ridge_prototypes(np.eye(2), np.array([0, 1]), 2) == pytest.approx(np.array([[half, -half], [-half, half]]))


@pytest.mark.parametrize("dim", [12, 5])
def test_prototypes_follow_the_primal_equations_whichever_are_the_smaller(dim):
    support, labels = drawn([1, 4, 2], dim=dim)
    assert ridge_prototypes(support, labels, 3) == pytest.approx(slow_prototypes(support, labels, 3))


def test_order_of_examples_does_not_matter_and_names_of_labels_go_along():
    support, labels = drawn([3, 2, 4])
    order = np.random.default_rng(1).permutation(len(labels))
    prototypes = ridge_prototypes(support, labels, 3)
    assert ridge_prototypes(support[order], labels[order], 3) == pytest.approx(prototypes)
    assert ridge_prototypes(support, 2 - labels, 3) == pytest.approx(prototypes[::-1])


def test_one_label_has_the_mean_of_its_examples():
    support, labels = drawn([3])
    assert ridge_prototypes(support, labels, 1)[0] == pytest.approx(
        l2_normalise(support.mean(axis=0, keepdims=True))[0]
    )
    assert not support_centre(support, labels, 1).any()


def test_the_centre_weighs_labels_not_examples():
    support, labels = drawn([1, 9])
    means = [support[labels == label].mean(axis=0) for label in (0, 1)]
    assert support_centre(support, labels, 2) == pytest.approx(CENTRE_SHARE * np.mean(means, axis=0))


def test_a_label_without_examples_is_an_error():
    with pytest.raises(EmptyClassError):
        ridge_prototypes(np.eye(2), np.array([0, 0]), 2)


@pytest.mark.parametrize("with_copies", [False, True])
def test_leaving_out_equals_fitting_without(with_copies):
    support, labels = drawn([3, 4, 2], seed=3)
    copies = np.eye(len(labels), dtype=bool)
    if with_copies:
        support[1] = support[0]
        copies[0, 1] = copies[1, 0] = True
    found = left_out_cosines(support @ support.T, labels, 3, copies)
    targets = np.eye(3)[labels]
    targets = targets - targets.mean(axis=0)
    for row in range(len(labels)):
        kept = ~copies[row]
        rest = support[kept]
        weights = np.linalg.solve(rest.T @ rest + RIDGE * np.eye(rest.shape[1]), rest.T @ targets[kept])
        assert found[row] == pytest.approx(support[row] @ weights / np.linalg.norm(weights, axis=0))


def test_episodes_at_once_equal_one_at_a_time():
    rng = np.random.default_rng(0)
    support = l2_normalise(rng.standard_normal((4, 3, 2, 10)))
    query = l2_normalise(rng.standard_normal((4, 5, 10)))
    found = episode_cosines(support, query)
    labels = np.repeat(np.arange(3), 2)
    for episode in range(4):
        examples = support[episode].reshape(6, 10)
        centre = support_centre(examples, labels, 3)
        prototypes = ridge_prototypes(l2_normalise(examples - centre), labels, 3)
        assert found[episode] == pytest.approx(l2_normalise(query[episode] - centre) @ prototypes.T)


def test_labels_of_unequal_size_are_told_apart_better_than_by_means():
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((5, 40)) + 2 * rng.standard_normal(40)  # much in common
    hits = {"mean": [], "ridge": []}
    for _ in range(60):
        labels = np.repeat(np.arange(5), rng.integers(1, 8, 5))
        support = l2_normalise(kinds[labels] + 1.5 * rng.standard_normal((len(labels), 40)))
        truth = np.repeat(np.arange(5), 10)
        query = l2_normalise(kinds[truth] + 1.5 * rng.standard_normal((50, 40)))
        means = l2_normalise(np.stack([support[labels == k].mean(axis=0) for k in range(5)]))
        hits["mean"].append(((query @ means.T).argmax(axis=1) == truth).mean())
        hits["ridge"].append(((query @ ridge_prototypes(support, labels, 5).T).argmax(axis=1) == truth).mean())
    assert np.mean(hits["ridge"]) > np.mean(hits["mean"]) + 0.02


def slow_together(queries, support, labels, n_way):
    """The same in the primal, each query image left out by fitting again without it."""
    means = np.stack([support[labels == k].mean(axis=0) for k in range(n_way)])
    centre = TOGETHER_SHARE * (means.mean(axis=0) + queries.mean(axis=0)) / 2
    s, q = l2_normalise(support - centre), l2_normalise(queries - centre)
    cosines = q @ slow_prototypes(s, labels, n_way).T
    for _ in range(ITERATIONS):
        votes = np.exp(TEMPERATURE * cosines)
        votes /= votes.sum(axis=1, keepdims=True)
        photos, targets = np.concatenate([s, q]), np.concatenate([np.eye(n_way)[labels], votes])
        weights = np.concatenate([np.ones(len(s)), np.full(len(q), QUERY_WEIGHT)])
        targets = targets - weights @ targets / weights.sum()
        cosines = np.empty_like(cosines)
        for row in range(len(q)):
            kept = np.arange(len(photos)) != len(s) + row
            x, w, y = photos[kept], weights[kept, None], targets[kept]
            solved = np.linalg.solve(x.T @ (w * x) + RIDGE * np.eye(x.shape[1]), x.T @ (w * y))
            cosines[row] = q[row] @ solved / np.linalg.norm(solved, axis=0)
    return cosines


def test_answering_together_equals_fitting_again_without_each_photo():
    support, labels = drawn([2, 1, 3])
    queries, _ = drawn([4, 2, 3], seed=5)
    assert answer_together(queries, support, labels, 3) == pytest.approx(slow_together(queries, support, labels, 3))


def test_answering_together_does_not_depend_on_order():
    support, labels = drawn([2, 3])
    queries, _ = drawn([6, 5], seed=5)
    order = np.random.default_rng(0).permutation(len(queries))
    assert answer_together(queries[order], support, labels, 2) == pytest.approx(
        answer_together(queries, support, labels, 2)[order]
    )


def test_an_empty_batch_and_a_single_label_have_answers_too():
    support, labels = drawn([3])
    assert answer_together(support[:0], support, labels, 1).shape == (0, 1)
    assert answer_together(support, support, labels, 1).shape == (3, 1)


def test_a_batch_helps_where_one_example_is_not_enough():
    rng = np.random.default_rng(0)
    alone, together = [], []
    for _ in range(40):
        kinds = rng.standard_normal((4, 30))
        labels = np.arange(4)
        support = l2_normalise(kinds + 1.2 * rng.standard_normal((4, 30)))
        truth = rng.choice(4, 40, p=[0.5, 0.3, 0.1, 0.1])
        queries = l2_normalise(kinds[truth] + 1.2 * rng.standard_normal((40, 30)))
        alone.append((episode_cosines(support[None, :, None], queries[None])[0].argmax(axis=1) == truth).mean())
        together.append((answer_together(queries, support, labels, 4).argmax(axis=1) == truth).mean())
    assert np.mean(together) > np.mean(alone) + 0.05
