"""Checkpoints: one safetensors file that carries its own description as JSON, replaced in one step.

Nothing here is ever unpickled. Arrays are numpy, so that reading a checkpoint needs no torch.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from fewshot_engine.errors import CheckpointError

FORMAT = "fewshot-engine/1"
STALE_AFTER_S = 600  # an abandoned temporary file this old belongs to a process that died


def save(path: Path, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint so that `path` holds either the old one or the new one, whatever is killed when.

    Args:
        tensors: name -> array of any numeric dtype.
        meta: what JSON can hold; NaN it cannot.

    Raises:
        CheckpointError: it cannot be written (disk full, no permission); what was at `path` is still there.
    """
    try:
        header = json.dumps(dict(meta), allow_nan=False)
    except ValueError as error:
        raise CheckpointError(f"this description is no JSON: {error}") from error
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in tensors.items()}
    write_atomically(Path(path), to_bytes(arrays, {"format": FORMAT, "meta": header}))


def load(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """The tensors and the description that `save` was given.

    Raises:
        CheckpointError: there is none, it is damaged, or it is something else.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="numpy") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path.name} is no checkpoint of this engine (its format is {header.get('format')!r})"
                )
            meta = json.loads(header["meta"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- not a mapping
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint at {path.name}") from error
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path.name} cannot be read as a checkpoint: {error}") from error
    if not isinstance(meta, dict):
        raise CheckpointError(f"{path.name} cannot be read as a checkpoint: its description is no object")
    return tensors, meta


def write_atomically(path: Path, content: bytes) -> None:
    """Temporary file beside it, fsync, rename, fsync of the folder; raises CheckpointError and leaves `path` alone."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"{path.name} could not be written: {error.strerror or error}") from error


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Remove what a killed process left; a young file may belong to one that lives."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        try:
            if time.time() - leftover.stat().st_mtime > STALE_AFTER_S:
                leftover.unlink()
        except FileNotFoundError:
            continue
