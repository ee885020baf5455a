"""What this process has loaded: encoders and recipes, each once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from django.conf import settings
from django.core.files.storage import default_storage
from numpy.typing import NDArray

from fewshot_engine.encoder import Encoder, load_encoder
from fewshot_engine.known_classes import load_known_classes
from fewshot_engine.prototypes import Rule
from fewshot_engine.recipes import Recipe, load_recipe
from webapp.training.models import DEFAULT_ENCODER, Model
from worker.vectors import members

Vectors = NDArray[np.float32]
CORES = os.cpu_count() or 1


@lru_cache(maxsize=6)  # the members of the accurate encoder, and some trained backbones
def encoder(backbone: str) -> Encoder:
    """The encoder of a backbone's name: a built-in one, or `model-…` of a run that trained its own.

    Raises:
        Model.DoesNotExist: no such model any more.
        EngineError: its weights are not to be read.
    """
    source = backbone
    if backbone.startswith("model-"):
        source = default_storage.path(Model.objects.get(backbone=backbone, kind=Model.Kind.FULL).folder)
    folder = Path(settings.DATA_DIR) / "encoders"
    with _one_process(folder):
        return load_encoder(source, cache_dir=folder, threads=1)  # who has several photos sends them in parts


@contextmanager
def _one_process(folder: Path) -> Iterator[None]:
    """At the first start each worker wants what only needs to be exported once: the others wait for the file."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@lru_cache(maxsize=8)
def _recipe(folder: str) -> Recipe:
    return load_recipe(Path(default_storage.path(folder)))


def familiarity(model: Model, vectors: Vectors) -> float | None:
    """How much photos, by the embeddings of the model's backbone, are of the kind that it was adapted to, 0 to 1.

    None for a model that was adapted to nothing.
    """
    return _recipe(model.folder).familiarity(vectors) if model.kind == Model.Kind.ADAPT else None


def as_seen_by(model: Model, vectors: Vectors, familiarity: float | None) -> Vectors:
    """(n, dim) embeddings of the model's backbone -> (n, m) of the model.

    Args:
        familiarity: of the photos of the label set's examples, for examples and query images alike.
    """
    return vectors if familiarity is None else _recipe(model.folder).apply(vectors, familiarity=familiarity)


def likeness(model: Model, vectors: Vectors, familiarity: float | None) -> Vectors | None:
    """What the classes that photos resemble look like to the model, beside what `as_seen_by` makes of them.

    Args:
        vectors: (n, dim), embeddings of the model's backbone.

    Returns:
        (n, m), or None where its backbone knows no classes.
    """
    known = load_known_classes(members(model.backbone), Path(settings.DATA_DIR) / "encoders")
    if known is None:
        return None
    found = known.likeness(vectors)
    return found if familiarity is None else _recipe(model.folder).beside(found, familiarity=familiarity)


def rule(model: Model) -> Rule:
    """By which label sets on this model answer."""
    return Rule.usual(is_full=model.kind == Model.Kind.FULL)


def warm_up() -> None:
    """Load what the default encoder is made of, and push one picture through."""
    for backbone in members(DEFAULT_ENCODER):
        loaded = encoder(backbone)
        loaded.encode(np.zeros((1, *loaded.input_shape), dtype=np.uint8))
    folder = Path(settings.DATA_DIR) / "encoders"
    with _one_process(folder):
        load_known_classes(members(DEFAULT_ENCODER), folder)
