import numpy as np
import pytest

from fewshot_engine.leave_one_out import leave_one_out, near_copies
from fewshot_engine.prototypes import Rule, l2_normalise
from fewshot_engine.ridge import RIDGE


def drawn(counts, *, dim=16, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(counts)), counts)
    directions = rng.normal(size=(len(counts), dim))
    return l2_normalise(directions[labels] + rng.normal(size=(len(labels), dim))), labels


def similarity(photo, own, rule):
    mean = own.mean(axis=0)
    if rule.metric == "euclidean":
        return 1 - ((photo - mean) ** 2).sum() / 2
    return photo @ mean / np.linalg.norm(mean)


def slow(support, labels, n_way, rule, photo, gone):
    """Similarities of one example to what is left of each label when the rows `gone` are taken away."""
    result = np.full(n_way, -1.0)
    for label in range(n_way):
        own = [row for row in range(len(labels)) if labels[row] == label and row not in gone]
        if own:
            result[label] = similarity(photo, support[own], rule)
    return result


def slow_ridge(support, labels, n_way, photo, gone):
    """Ridge regression without the rows `gone`, solved again, with the offsets of all."""
    left = [row for row in range(len(labels)) if row not in gone]
    targets = np.eye(n_way)[labels] - np.eye(n_way)[labels].mean(axis=0)
    weights = np.linalg.solve(
        support[left].T @ support[left] + RIDGE * np.eye(support.shape[1]), support[left].T @ targets[left]
    )
    return photo @ weights / np.linalg.norm(weights, axis=0)


def with_copy(counts=(4, 3, 1)):
    support, labels = drawn(counts)
    support[1] = support[0]
    return support, labels, near_copies(support, labels)


def test_copies_are_of_one_label_and_nearly_the_same():
    support, labels, copies = with_copy()
    assert copies[0, 1] and copies[1, 0]
    assert copies.sum() == len(labels) + 2
    labels[1] = 1
    assert near_copies(support, labels).sum() == len(labels)


@pytest.mark.parametrize("rule", [Rule("cosine"), Rule("euclidean")])
def test_means_without_each_example_agree_with_a_loop(rule):
    support, labels, copies = with_copy()
    found = leave_one_out(support, labels, 3, rule, copies)
    for row, photo in enumerate(support):
        expected = slow(support, labels, 3, rule, photo, np.flatnonzero(copies[row]))
        np.testing.assert_allclose(found.similarities[row], expected, atol=1e-9)
        expected = slow(support, labels, 3, rule, photo, np.flatnonzero(labels == labels[row]))
        np.testing.assert_allclose(found.foreign[row], expected, atol=1e-9)
    np.testing.assert_array_equal(found.has_company, [True] * 7 + [False])


def test_ridge_without_each_example_agrees_with_solving_again():
    support, labels, copies = with_copy()
    found = leave_one_out(support, labels, 3, Rule(), copies)
    for row, photo in enumerate(support):
        expected = slow_ridge(support, labels, 3, photo, np.flatnonzero(copies[row]))
        if not found.has_company[row]:
            expected[labels[row]] = -1
        np.testing.assert_allclose(found.similarities[row], expected, atol=1e-9)
        expected = slow_ridge(support, labels, 3, photo, np.flatnonzero(labels == labels[row]))
        expected[labels[row]] = -1
        np.testing.assert_allclose(found.foreign[row], expected, atol=1e-9)


def test_with_several_prototypes_the_best_of_each_label_counts():
    far = l2_normalise(np.eye(4)[[0, 0, 0, 1, 1, 1, 2, 2, 2]] + 0.01 * np.random.default_rng(0).normal(size=(9, 4)))
    labels = np.repeat([0, 1], [6, 3])  # label 0 is of two kinds
    none = np.eye(9, dtype=bool)
    several = leave_one_out(far, labels, 2, Rule("cosine", prototypes=2), none)
    one = leave_one_out(far, labels, 2, Rule("cosine"), none)
    assert (several.similarities[:6, 0] > 0.99).all()
    assert (one.similarities[:6, 0] < 0.8).all()


def test_hits_and_the_mean_across_by_hand():
    support = np.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    found = leave_one_out(support, np.array([0, 0, 1]), 2, Rule("cosine"), np.eye(3, dtype=bool))
    np.testing.assert_allclose(found.similarities[:2], [[0.8, 0.0], [0.8, 0.6]])
    np.testing.assert_array_equal(found.hits, [True, True, False])  # the third has no company
    mean = np.array([1.8, 0.6]) / np.hypot(1.8, 0.6)
    assert found.across == pytest.approx((0 + 0.6 + mean[1]) / 3)
    assert np.isnan(leave_one_out(support, np.zeros(3, dtype=int), 1, Rule(), np.eye(3, dtype=bool)).across)
