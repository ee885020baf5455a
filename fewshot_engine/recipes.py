"""Finished models on disk: a folder with model.safetensors and its card, model.json. Reading one needs no torch.

A model of the kind *adapt* is a recipe over the embeddings of a frozen backbone: it puts what it makes of an embedding
beside the embedding itself, and lets the frozen one speak where photos are not of the kind that it was adapted to. A
model of the kind *full* holds the weights of its backbone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot_engine import checkpoints
from fewshot_engine.errors import CheckpointError

WEIGHTS, CARD = "model.safetensors", "model.json"
RECIPE_TENSORS = ("centre", "basis", "core", "class_means")
FAMILIARITY_WIDTH = 0.02  # of the curve, in cosine: the mean of five photos of one kind varies by about 0.04


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the embeddings of a backbone become those of an adapted model.

    An L2-normalised embedding x becomes two halves: x itself, and a = normalise(z + z B C B') with z = x - centre. They
    are weighted so that a cosine between two results is (1 - w) times that of the x plus w times that of the a. One w
    holds for a whole set of photos that are compared, for it is a choice between two encoders: w = share x familiarity.

    Attributes:
        centre: (dim,), the mean of the base classes' means.
        basis: (dim, r), orthonormal: B.
        core: (r, r): C.
        class_means: (n_classes, dim), rows of length 1, of the classes that the model was adapted to.
        share: of the adapted half for photos of their kind, 0 to 1; from cross-validation.
        familiar_from: the mean cosine to the nearest class mean at which photos are half familiar.
        card: what model.json says.
    """

    centre: NDArray[np.float32]
    basis: NDArray[np.float32]
    core: NDArray[np.float32]
    class_means: NDArray[np.float32]
    share: float
    familiar_from: float
    card: dict[str, Any]

    def familiarity(self, embeddings: NDArray[np.float32]) -> float:
        """How much photos are of the kind that the model was adapted to, from 0 to 1.

        Ask it of all photos of a label set's support at once, or of a whole folder: a mean over several photos is far
        surer than one photo's, and photos can be compared only where one answer holds for all of them.

        Args:
            embeddings: (n, dim) of the backbone, of any length; n at least 1.

        Raises:
            CheckpointError: the embeddings have another dimension than the recipe, or there are none.
        """
        unit = self._checked(embeddings)
        if not len(unit):
            raise CheckpointError("familiarity is asked of photos, and there are none")
        return familiarity_of(float((unit @ self.class_means.T).max(axis=1).mean()), self.familiar_from)

    def apply(self, embeddings: NDArray[np.float32], *, familiarity: float = 1.0) -> NDArray[np.float32]:
        """(n, dim) embeddings of the backbone, of any length -> (n, 2 dim), L2-normalised.

        Args:
            familiarity: of the set of photos that these are compared with; photos of one set need the same.

        Raises:
            CheckpointError: the embeddings have another dimension than the recipe.
        """
        unit = self._checked(embeddings)
        z: NDArray[np.float32] = unit - self.centre
        z += (z @ self.basis) @ self.core @ self.basis.T
        weight = self.share * familiarity
        halves = [np.float32((1 - weight) ** 0.5) * unit, np.float32(weight**0.5) * _unit(z)]
        result: NDArray[np.float32] = np.concatenate(halves, axis=1)
        return result

    def beside(self, likeness: NDArray[np.float32], *, familiarity: float) -> NDArray[np.float32]:
        """What the classes that photos resemble look like, (n, dim) of the backbone -> (n, 2 dim) beside `apply`'s.

        The frozen half alone takes it in. Sent through the map as well it changed nothing within the noise.

        Args:
            likeness: of `Encoder.likeness`.
            familiarity: as for `apply`.
        """
        share = np.float32((1 - self.share * familiarity) ** 0.5)
        return np.concatenate([share * likeness, np.zeros_like(likeness)], axis=1)

    def _checked(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.centre):
            backbone = self.card.get("backbone")
            raise CheckpointError(f"embeddings are {embeddings.shape}; {backbone} gives (n, {len(self.centre)})")
        return _unit(np.asarray(embeddings, dtype=np.float32))


def familiarity_of(cosine: float, familiar_from: float) -> float:
    """From a mean cosine to the nearest class mean to a weight: a logistic curve, 1/2 at `familiar_from`."""
    return 1 / (1 + math.exp(-(cosine - familiar_from) / FAMILIARITY_WIDTH))


def load_recipe(path: Path) -> Recipe:
    """Read a model of the kind *adapt*; keep it, for reading costs more than applying.

    Raises:
        CheckpointError: there is none, it is damaged, or it is of the kind *full*.
    """
    tensors, card = load_model(path)
    if card.get("kind") != "adapt":
        raise CheckpointError(
            f"{Path(path).name} is a backbone of its own ({card.get('kind')}), no recipe over embeddings"
        )
    try:
        share, familiar_from = float(card["share"]), float(card["familiar_from"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{Path(path).name} does not say how its two halves are weighted") from error
    centre, basis, core, class_means = (tensors[name] for name in RECIPE_TENSORS)
    return Recipe(centre, basis, core, class_means, share, familiar_from, card)


def load_model(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors and card of a model of either kind; `path` is its folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    tensors, card = checkpoints.load(Path(path) / WEIGHTS)
    lacking = set(RECIPE_TENSORS) - tensors.keys()
    if card.get("kind") == "adapt" and lacking:
        raise CheckpointError(f"{Path(path).name} lacks its {', its '.join(sorted(lacking))}")
    return tensors, card


def save_model(path: Path, tensors: Mapping[str, NDArray[Any]], card: Mapping[str, Any]) -> None:
    """Write the folder whole, then move it to `path`; a model already there is replaced.

    The card is in both files: in the weights so that the two cannot disagree, in model.json for people.
    """
    path = Path(path)
    building = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    try:
        checkpoints.save(building / WEIGHTS, tensors, card)
        checkpoints.write_atomically(building / CARD, json.dumps(card, indent=2).encode())
        if path.exists():
            shutil.rmtree(path)
        building.rename(path)
    except OSError as error:
        raise CheckpointError(f"{path.name} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length 1; a row of zeros stays as it is."""
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: NDArray[np.float32] = rows / np.maximum(lengths, np.float32(1e-12))
    return unit
