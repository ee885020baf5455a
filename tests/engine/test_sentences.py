import subprocess
import sys

import numpy as np
import pytest

from fewshot_engine import sentences
from fewshot_engine.errors import WeightsMissing
from fewshot_engine.sentences import encode_sentences

SAID = ["a cat on the mat", "kitten", "beret: a flat round hat", "Gorge à vélo"]


def test_sentences_are_encoded_as_the_library_that_tuned_the_model_does():
    """Expectations from sentence-transformers 6.2 with the same weights."""
    vectors = encode_sentences(SAID)
    np.testing.assert_allclose(
        vectors[:, :3],
        [
            [0.10186, 0.00271, -0.02091],
            [-0.02221, 0.02295, -0.02435],
            [-0.02621, 0.12503, -0.02320],
            [-0.07144, 0.04528, -0.05518],
        ],
        atol=2e-5,
    )
    np.testing.assert_allclose(vectors[0] @ vectors[1:].T, [0.45403, -0.03496, 0.04689], atol=2e-5)


def test_company_and_order_change_no_sentence():
    together = encode_sentences(
        [*SAID, "a much longer sentence, which makes all of the others be padded to its length"]
    )
    alone = np.concatenate([encode_sentences([one]) for one in SAID])
    np.testing.assert_allclose(together[:4], alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_no_sentence_and_an_endless_one_are_answered():
    assert encode_sentences([]).shape == (0, 384)
    endless = encode_sentences(["cat " * 256, "cat " * 400])
    np.testing.assert_allclose(endless[0], endless[1], atol=1e-5)


def test_neither_torch_nor_transformers_is_loaded():
    code = "import sys; from fewshot_engine import sentences; sentences.encode_sentences(['a']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "sentence_transformers"} & set(done.stdout.split())


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(sentences, "PACKAGE", "no-such-model")
    with pytest.raises(WeightsMissing, match="install the package no-such-model"):
        sentences.model_file()
