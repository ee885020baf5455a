import numpy as np
import pytest

from fewshot_engine import known_classes
from fewshot_engine.inference import classify, fit
from fewshot_engine.known_classes import FEATURE_LENGTH, KnownClasses, load_known_classes
from fewshot_engine.prototypes import l2_normalise


def test_the_classifiers_of_a_fused_encoder_are_averaged():
    weights = np.stack([np.eye(3), np.roll(np.eye(3), 1, axis=0)]).astype(np.float32)
    known = KnownClasses(weights, np.array([[0, 0, 1], [0, 0, 2]], dtype=np.float32))
    expected = [FEATURE_LENGTH / 2, FEATURE_LENGTH / 2, 1.5]
    np.testing.assert_allclose(known.logits(np.array([[2.0, 0, 0, 7.0, 0, 0]])), [expected], rtol=1e-5)
    with pytest.raises(ValueError, match=r"2 classifiers take \(n, 6\)"):
        known.logits(np.ones((1, 3)))


def test_likeness_by_hand():
    weights = np.array([[[3.0, 0], [0, 1], [0, -1], [-3, 0]]], dtype=np.float32)  # their mean is 0
    bias = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32))
    known = KnownClasses(weights / 1e6, bias)  # so flat that the biases alone decide
    likeness = known.likeness(np.array([[5.0, 5.0], [0.0, 2.0]]))
    np.testing.assert_allclose(likeness, [[0.4 - 0.1, 0.3 - 0.2]] * 2, atol=1e-4)
    sure = KnownClasses(weights, bias).likeness(np.array([[1.0, 0.0]]))
    np.testing.assert_allclose(sure, [[1, 0]], atol=1e-4)
    assert KnownClasses(weights, bias).likeness(np.empty((0, 2))).shape == (0, 2)


def test_an_example_that_shows_one_side_borrows_the_others():
    """Each label is a known class; its example lies off to one side, by what examples of any label may share."""
    rng = np.random.default_rng(0)
    kinds = l2_normalise(rng.standard_normal((6, 40))).astype(np.float32)
    known = KnownClasses(kinds[None], np.zeros((1, 6), dtype=np.float32))
    hits = {"alone": [], "lent": []}
    for _ in range(20):
        truth = np.repeat(np.arange(5), 20)
        photos = kinds[truth] + 0.2 * rng.standard_normal((100, 40))
        support = kinds[:5] + 0.2 * rng.standard_normal((5, 40))
        for name, likeness in (("alone", None), ("lent", known.likeness(support))):
            model = fit(support, np.arange(5), 5, likeness=likeness)
            hits[name].append((classify(model, photos).labels[:, 0] == truth).mean())
    assert np.mean(hits["lent"]) > np.mean(hits["alone"]) + 0.05


def test_what_an_encoder_knows_is_read_once_from_its_weights(exported):
    known = load_known_classes(["efficientnet-lite0@crop"], exported)
    assert (known.weights.shape, known.biases.shape) == ((1, 1000, 1280), (1, 1000))
    (kept,) = exported.glob("efficientnet-lite0-classes-*.npz")
    before = kept.stat().st_mtime_ns
    known_classes._load.cache_clear()
    np.testing.assert_array_equal(load_known_classes(["efficientnet-lite0"], exported).weights, known.weights)
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("backbones", [["resnet12"], ["efficientnet-lite0", "resnet50"], ["/models/mine"]])
def test_an_encoder_with_a_member_that_has_no_classifier_knows_nothing(tmp_path, backbones):
    assert load_known_classes(backbones, tmp_path) is None
    assert not list(tmp_path.iterdir())


def test_weights_of_ones_own_come_without_a_classifier(tmp_path):
    known_classes.write_atomically(tmp_path / "own.npz", _npz(weights=np.empty((0, 0)), biases=np.empty(0)))
    assert known_classes._load((tmp_path / "own.npz",)) is None


def _npz(**arrays):
    import io

    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()
