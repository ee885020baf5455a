import numpy as np
import pytest

from fewshot_engine.errors import ConfigError, EmptyClassError
from fewshot_engine.prototypes import (
    Rule,
    compute_prototypes,
    cosine_prototypes,
    cosine_similarity,
    l2_normalise,
    split_classes_in_groups,
    squared_euclidean,
)


def test_a_prototype_is_the_mean_of_its_class():
    embeddings = np.array([[1.0, 0.0], [0.0, 4.0], [3.0, 2.0]], dtype=np.float32)
    prototypes = compute_prototypes(embeddings, np.array([1, 0, 1]), 2)
    np.testing.assert_array_equal(prototypes, [[0, 4], [2, 1]])
    assert prototypes.dtype == np.float32


def test_the_fast_mean_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    embeddings, labels = rng.normal(size=(60, 7)), rng.permutation(np.arange(60) % 9)
    slow = np.array(
        [np.mean([e for e, label in zip(embeddings, labels, strict=True) if label == k], 0) for k in range(9)]
    )
    np.testing.assert_allclose(compute_prototypes(embeddings, labels, 9), slow)


def test_the_order_of_the_support_does_not_matter():
    rng = np.random.default_rng(1)
    embeddings, labels = rng.normal(size=(30, 5)), np.arange(30) % 6
    order = rng.permutation(30)
    once, again = (cosine_prototypes(embeddings[o], labels[o], 6) for o in (np.arange(30), order))
    np.testing.assert_allclose(once, again, atol=1e-12)


def test_a_label_without_examples_has_no_prototype():
    for labels, way in ((np.array([0, 2]), 3), (np.array([0, 1]), 3)):
        with pytest.raises(EmptyClassError, match="no example"):
            compute_prototypes(np.eye(2), labels, way)


def test_labels_out_of_range_are_an_error():
    with pytest.raises(ValueError, match="0 to 1"):
        compute_prototypes(np.eye(2), np.array([0, 2]), 2)
    with pytest.raises(ValueError, match="belong together"):
        compute_prototypes(np.eye(2), np.array([0]), 1)


def test_distances_by_hand():
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 0.0]])
    np.testing.assert_allclose(squared_euclidean(a, b), [[25, 16], [0, 9]])
    np.testing.assert_allclose(cosine_similarity(a, b), [[0, 0.6], [0, 0]])


def test_zero_vectors_stay_zero():
    np.testing.assert_array_equal(l2_normalise(np.zeros((2, 3))), 0)


def two_kinds(seed=0):
    """Class 0 around two axes, class 1 around one, class 2 of two photos; L2-normalised."""
    noise = 0.05 * np.random.default_rng(seed).normal(size=(17, 8))
    return l2_normalise(np.eye(8)[[0] * 5 + [1] * 5 + [2] * 5 + [3] * 2] + noise), np.repeat([0, 1, 2], [10, 5, 2])


def test_groups_find_the_kinds_within_a_class():
    photos, labels = two_kinds()
    groups, class_of = split_classes_in_groups(photos, labels, 3, 2)
    assert len(set(groups[:5])) == len(set(groups[5:10])) == 1 and groups[0] != groups[5]
    np.testing.assert_array_equal(class_of[groups], labels)
    assert (class_of == 2).sum() == 1  # two photos are not split
    assert set(groups) == set(range(len(class_of)))


def test_the_order_of_examples_does_not_change_their_groups():
    photos, labels = two_kinds()
    order = np.random.default_rng(1).permutation(len(labels))
    groups, _ = split_classes_in_groups(photos, labels, 3, 3)
    shuffled, _ = split_classes_in_groups(photos[order], labels[order], 3, 3)
    together = groups[:, None] == groups
    np.testing.assert_array_equal(shuffled[:, None] == shuffled, together[np.ix_(order, order)])


def test_one_prototype_a_class_is_one_group_a_class():
    photos, labels = two_kinds()
    groups, class_of = split_classes_in_groups(photos, labels, 3, 1)
    np.testing.assert_array_equal(groups, labels)
    np.testing.assert_array_equal(class_of, [0, 1, 2])


@pytest.mark.parametrize(
    "options", [{"metric": "manhattan"}, {"prototypes": 0}, {"prototypes": 2}, {"metric": "cosine", "prototypes": 11}]
)
def test_a_rule_checks_itself(options):
    with pytest.raises(ConfigError):
        Rule(**options)
