"""What a pretrained classifier knows, lent to a few examples.

A single example shows its label from one side. The network that embeds it has learned a thousand kinds of things from a
thousand photos each, and its last layer says which of these the example resembles; the layer's weights say what such
things look like, seen from many sides. A label borrows that, the less the more examples it has. It is the idea of Yang
et al. 2021 ("Free lunch for few-shot learning"), who borrow the statistics of similar base classes, for a model of
which the weights are at hand and the photos are not.

With the accurate encoder at 5 ways it is worth, at 1, 2 and 5 examples: clothing 0.7, 0.4, 0.1 points; grocery 0.1,
-0.1, 0; miniImageNet 3.7, 1.5, 0.4 (whose classes are among the thousand); drawn letters, which resemble nothing that
the classifier knows, -0.3, 0, 0. Adding it to query images as well costs 1 to 3 points on groceries: where labels are
finer than the thousand, it draws their photos together.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fewshot_engine.apart import answer, run_apart
from fewshot_engine.backbones import get_backbone
from fewshot_engine.checkpoints import write_atomically
from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.prototypes import FloatArray, l2_normalise
from fewshot_engine.weights import read_state_dict

Float32Array = npt.NDArray[np.float32]

CLASSIFIERS = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")  # whose weights hold a last layer
# Of Lite0's pooled features on photos. Each photo's own length, lost in a fused embedding, would add nothing.
FEATURE_LENGTH = np.float32(17.0)


@dataclass(frozen=True, eq=False)
class KnownClasses:
    """The last layers of b classifiers of the same m classes, whose features lie side by side in an embedding.

    Attributes:
        weights: (b, m, dim).
        biases: (b, m).
    """

    weights: Float32Array
    biases: Float32Array

    def logits(self, embeddings: FloatArray) -> FloatArray:
        """The mean of the classifiers' logits: (n, b * dim), of any length -> (n, m)."""
        count, _, dim = self.weights.shape
        if embeddings.ndim != 2 or embeddings.shape[1] != count * dim:
            raise ValueError(f"embeddings have shape {embeddings.shape}: {count} classifiers take (n, {count * dim})")
        features = l2_normalise(embeddings.reshape(-1, count, dim)) * FEATURE_LENGTH
        logits: FloatArray = np.einsum("nbd,bmd->nm", features, self.weights, optimize=True) / count
        logits += self.biases.mean(axis=0)
        return logits

    def likeness(self, embeddings: FloatArray) -> Float32Array:
        """What the classes that each photo resembles look like: (n, b * dim), any length -> (n, b * dim), at most 1.

        The mean of the classes' weights, centred and of length 1 each, in the proportions of the softmax. The less the
        classifiers agree on a class, the shorter it is, and the less is borrowed.
        """
        count, _, dim = self.weights.shape
        logits = self.logits(embeddings)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        shares /= shares.sum(axis=1, keepdims=True)
        directions = l2_normalise(self.weights - self.weights.mean(axis=1, keepdims=True))  # (b, m, dim)
        found = np.einsum("nm,bmd->nbd", shares, directions, optimize=True) / np.sqrt(count)
        likeness: Float32Array = found.reshape(len(embeddings), count * dim).astype(np.float32)
        return likeness


def load_known_classes(backbones: Sequence[str], cache_dir: Path) -> KnownClasses | None:
    """The last layers of an encoder's backbones, kept in `cache_dir` after the first time; None where one has none.

    Args:
        backbones: their names; how one frames a photo, behind @, is nothing to its classifier.

    Raises:
        WeightsMissing: a package with weights is not installed.
    """
    names = tuple(name.partition("@")[0] for name in backbones)
    if not set(names) <= set(CLASSIFIERS):
        return None
    return _load(tuple(_kept(name, cache_dir) for name in names))


@lru_cache(maxsize=4)
def _load(files: tuple[Path, ...]) -> KnownClasses | None:
    layers = []
    for file in files:
        with np.load(file, allow_pickle=False) as arrays:
            layers.append((arrays["weights"], arrays["biases"]))
    if not all(len(weights) for weights, _ in layers):  # somebody's own weights, kept by `weights`
        return None
    return KnownClasses(*(np.stack(part) for part in zip(*layers, strict=True)))


def _kept(backbone: str, cache_dir: Path) -> Path:
    with open(get_backbone(backbone).weights(), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = cache_dir / f"{backbone}-classes-{ENGINE_VERSION}-{digest[:16]}.npz"
    if not path.is_file():
        if "torch" in sys.modules:
            _write(path, backbone)
        else:
            run_apart("fewshot_engine.known_classes", str(path), backbone, what=f"the classes that {backbone} knows")
    return path


def _write(path: Path, backbone: str) -> None:
    layers = read_state_dict(get_backbone(backbone).weights())
    has_classifier = "_fc.weight" in layers
    content = io.BytesIO()
    np.savez(
        content,
        weights=layers["_fc.weight"].numpy() if has_classifier else np.empty((0, 0), dtype=np.float32),
        biases=layers["_fc.bias"].numpy() if has_classifier else np.empty(0, dtype=np.float32),
    )
    write_atomically(path, content.getvalue())


def _main(path: str, backbone: str) -> None:
    _write(Path(path), backbone)


if __name__ == "__main__":
    answer(_main)
