"""Finished models on disk: a folder with model.safetensors and its card, model.json. Reading one needs no torch.

A model of the kind *adapt* is a recipe over the embeddings of a frozen backbone: normalise((x - centre) @ map), where x
is the L2-normalised embedding. A model of the kind *full* holds the weights of its backbone.
"""

from __future__ import annotations

import json
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


@dataclass(frozen=True, eq=False)
class Recipe:
    """How the embeddings of a backbone become those of an adapted model.

    Attributes:
        centre: (dim,), the mean of the base classes' L2-normalised embeddings.
        map: (dim, dim), float32.
        card: what model.json says.
    """

    centre: NDArray[np.float32]
    map: NDArray[np.float32]
    card: dict[str, Any]

    def apply(self, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, dim) embeddings of the backbone, of any length -> (n, dim), L2-normalised.

        Raises:
            CheckpointError: the embeddings have another dimension than the recipe.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != len(self.centre):
            backbone = self.card.get("backbone")
            raise CheckpointError(f"embeddings are {embeddings.shape}; {backbone} gives (n, {len(self.centre)})")
        unit = _unit(np.asarray(embeddings, dtype=np.float32))
        moved: NDArray[np.float32] = np.matmul(unit - self.centre, self.map, dtype=np.float32)
        return _unit(moved)


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
    return Recipe(tensors["centre"], tensors["map"], card)


def apply_recipe(recipe_path: Path, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """`load_recipe` and `Recipe.apply` in one."""
    return load_recipe(recipe_path).apply(embeddings)


def load_model(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Tensors and card of a model of either kind; `path` is its folder.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    tensors, card = checkpoints.load(Path(path) / WEIGHTS)
    if card.get("kind") == "adapt" and not {"centre", "map"} <= tensors.keys():
        raise CheckpointError(f"{Path(path).name} lacks its centre or its map")
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
