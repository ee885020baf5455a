import numpy as np
import pytest

from fewshot_engine.errors import EmptyClassError
from fewshot_engine.prototypes import (
    compute_prototypes,
    cosine_prototypes,
    cosine_similarity,
    l2_normalise,
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
