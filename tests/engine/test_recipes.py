"""Finished *adapt* models: what they make of embeddings, and when they leave the answer to the frozen encoder."""

import numpy as np
import pytest

from fewshot_engine.errors import CheckpointError
from fewshot_engine.recipes import FAMILIARITY_WIDTH, Recipe, load_recipe, save_model

TENSORS = {
    "centre": np.array([0.6, 0], dtype=np.float32),
    "basis": np.array([[0], [1]], dtype=np.float32),
    "core": np.array([[-0.5]], dtype=np.float32),
    "class_means": np.array([[1, 0], [0, 1]], dtype=np.float32),
}
CARD = {"kind": "adapt", "backbone": "toy", "share": 0.64, "familiar_from": 0.9}


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "model", TENSORS, CARD)
    return tmp_path / "model"


def random_recipe(dim=20, rank=5, seed=0, share=0.8):
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((dim, rank)))[0].astype(np.float32)
    means = rng.standard_normal((4, dim)).astype(np.float32)
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    core, centre = (rng.standard_normal(shape).astype(np.float32) / 5 for shape in ((rank, rank), dim))
    return Recipe(centre, basis, core, means, share=share, familiar_from=0.5, card={"backbone": "toy"})


def test_a_recipe_by_hand(model):
    # (3, 4) -> x = (0.6, 0.8) -> z = (0, 0.8) -> (0, 0.4) -> a = (0, 1); weights 0.6 = (1 - 0.64)^(1/2) and 0.8
    result = load_recipe(model).apply(np.array([[3, 4]], dtype=np.float32))
    assert result == pytest.approx(np.array([[0.36, 0.48, 0, 0.8]]), abs=1e-6)
    assert result.dtype == np.float32


def test_a_cosine_is_the_weighted_mean_of_both_halves():
    recipe = random_recipe()
    x = np.random.default_rng(1).standard_normal((6, 20)).astype(np.float32)
    frozen = x / np.linalg.norm(x, axis=1, keepdims=True)
    whole = np.eye(20) + recipe.basis @ recipe.core @ recipe.basis.T  # the slow way: one (dim, dim) map
    adapted = (frozen - recipe.centre) @ whole
    adapted /= np.linalg.norm(adapted, axis=1, keepdims=True)
    for familiarity in (0.0, 0.3, 1.0):
        weight = 0.8 * familiarity
        expected = (1 - weight) * frozen @ frozen.T + weight * adapted @ adapted.T
        result = recipe.apply(x, familiarity=familiarity)
        assert result @ result.T == pytest.approx(expected, abs=1e-5)
        assert np.linalg.norm(result, axis=1) == pytest.approx(1, abs=1e-5)


def test_familiarity_by_hand(model):
    # Cosines to the nearest class mean are 0.8 and 1: their mean is where photos are half familiar.
    recipe = load_recipe(model)
    assert recipe.familiarity(np.array([[3, 4], [2, 0]], dtype=np.float32)) == pytest.approx(0.5, abs=1e-5)
    assert recipe.familiarity(np.array([[3, 4]], dtype=np.float32)) == pytest.approx(
        1 / (1 + np.exp(0.1 / FAMILIARITY_WIDTH)), abs=1e-5
    )
    assert recipe.familiarity(np.array([[0, 1]], dtype=np.float32)) > 0.99


def test_unfamiliar_photos_are_answered_by_the_frozen_encoder():
    recipe = random_recipe()
    away = -recipe.class_means
    frozen = away / np.linalg.norm(away, axis=1, keepdims=True)
    result = recipe.apply(away, familiarity=recipe.familiarity(away))
    assert result @ result.T == pytest.approx(frozen @ frozen.T, abs=1e-4)


def test_what_is_known_beside_the_photos_stands_by_the_frozen_half():
    recipe = random_recipe()
    x, likeness = np.random.default_rng(1).standard_normal((2, 6, 20)).astype(np.float32)
    frozen = x / np.linalg.norm(x, axis=1, keepdims=True)
    for familiarity in (0.0, 0.3, 1.0):
        beside = recipe.beside(likeness, familiarity=familiarity)
        products = recipe.apply(x, familiarity=familiarity) @ beside.T
        assert products == pytest.approx((1 - 0.8 * familiarity) * frozen @ likeness.T, abs=1e-5)


def test_what_is_no_recipe_is_refused(model, tmp_path):
    recipe = load_recipe(model)
    with pytest.raises(CheckpointError, match=r"embeddings are \(1, 3\); toy gives \(n, 2\)"):
        recipe.apply(np.ones((1, 3), dtype=np.float32))
    with pytest.raises(CheckpointError, match="there are none"):
        recipe.familiarity(np.ones((0, 2), dtype=np.float32))
    save_model(tmp_path / "bare", {"centre": TENSORS["centre"]}, CARD)
    with pytest.raises(CheckpointError, match="bare lacks its basis, its class_means, its core"):
        load_recipe(tmp_path / "bare")
    save_model(tmp_path / "mute", TENSORS, {"kind": "adapt"})
    with pytest.raises(CheckpointError, match="how its two halves are weighted"):
        load_recipe(tmp_path / "mute")
    save_model(tmp_path / "full", TENSORS, {"kind": "full"})
    with pytest.raises(CheckpointError, match="no recipe"):
        load_recipe(tmp_path / "full")
