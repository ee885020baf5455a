import numpy as np
import pytest

from fewshot_engine.errors import ConfigError
from fewshot_engine.projection import pca, project
from fewshot_engine.prototypes import l2_normalise


def clusters(each=20, dim=64, seed=0):
    """Three bundles of directions, of any length: (3 * each, dim) and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2], each)
    directions = rng.normal(size=(3, dim))[labels] + 0.3 * rng.normal(size=(3 * each, dim))
    return (directions * rng.uniform(1, 50, size=(3 * each, 1))).astype(np.float32), labels


def neighbours_agree(points, labels):
    """Share of the points whose nearest other point is of their label."""
    distances = ((points[:, None] - points[None]) ** 2).sum(-1)
    np.fill_diagonal(distances, np.inf)
    return (labels[distances.argmin(axis=1)] == labels).mean()


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_like_lies_beside_like_whatever_its_length(method):
    embeddings, labels = clusters()
    points = project(embeddings, method)
    assert (points.shape, points.dtype) == ((60, 2), np.float32)
    assert neighbours_agree(points, labels) == 1
    reach = points.max(axis=0) - points.min(axis=0)
    np.testing.assert_allclose([np.abs(points).max(), reach.max()], [1, 2], atol=1e-5)
    np.testing.assert_allclose(points.max(axis=0), -points.min(axis=0), atol=1e-5)


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_seed_makes_the_same_map_again(method):
    embeddings, _ = clusters()
    np.testing.assert_array_equal(project(embeddings, method, seed=3), project(embeddings, method, seed=3))


def test_pca_is_the_singular_value_decomposition_of_what_is_left_of_the_mean():
    embeddings, _ = clusters(dim=10)
    rows = l2_normalise(embeddings)
    left, values, _ = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(pca(embeddings)), np.abs(left[:, :2] * values[:2]), atol=1e-5)


def test_pca_of_fewer_points_than_dimensions_fills_with_zeros():
    components = pca(clusters(each=2)[0], dim=50)
    assert components.shape == (6, 50)
    assert (components[:, 5:] == 0).all()
    assert (np.abs(components[:, :5]).max(axis=0) > 0).all()


def test_the_aspect_ratio_is_kept():
    line = np.array([[1, 0, 0], [1, 0.1, 0], [1, -0.1, 0], [1, 0, 0.02]], dtype=np.float32)
    reach = np.ptp(project(line), axis=0)
    np.testing.assert_allclose(reach, [2, 0.2], rtol=0.05)


@pytest.mark.parametrize("method", ["pca", "umap", "tsne"])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 4])
def test_a_handful_of_points_is_drawn_by_every_method(method, n):
    points = project(np.eye(4, 8, dtype=np.float32)[:n], method)
    assert points.shape == (n, 2)
    assert np.isfinite(points).all()
    if n > 1:
        assert np.abs(points).max() == pytest.approx(1)


@pytest.mark.parametrize("n", [5, 6, 31])
def test_tsne_shrinks_its_perplexity_for_few_points(n):
    points = project(np.random.default_rng(0).normal(size=(n, 8)), "tsne")
    assert points.shape == (n, 2)
    assert np.isfinite(points).all()


@pytest.mark.parametrize("method", ["pca", "umap", "tsne"])
def test_photos_that_are_all_the_same_lie_in_the_middle(method):
    assert (project(np.ones((7, 4), dtype=np.float32), method) == 0).all()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match="method is 'mds'"):
        project(np.ones((3, 2)), "mds")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        project(np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        project(np.array([[1.0, np.nan]]))


@pytest.mark.bench
def test_umap_draws_the_same_map_of_neighbours():
    """Apart from the others because of the 40 seconds in which UMAP compiles itself."""
    embeddings, labels = clusters()
    points = project(embeddings, "umap", seed=3)
    assert neighbours_agree(points, labels) == 1
    np.testing.assert_array_equal(points, project(embeddings, "umap", seed=3))
    for n in (5, 6, 16):
        assert np.isfinite(project(embeddings[:n], "umap")).all()
