"""The studio's folder: that it can be used and by one `make run` alone, its secrets, and what runs on it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from webapp.run import StartError

DISK_NEEDED_GB = 0.5


def check_data_dir(path: Path, free_gb: Callable[[Path], float] | None = None) -> None:
    """Make the folder; StartError when nothing can be written there or the disk is (all but) full."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise StartError(
                f"The disk of {path} is full. Free some space, or choose another folder: DATA_DIR=…"
            ) from error
        raise StartError(
            f"DATA_DIR {path} cannot be written ({error.strerror}). Choose a folder of yours: make run DATA_DIR=…"
        ) from error
    free = (free_gb or _free_gb)(path)
    if free < DISK_NEEDED_GB:
        raise StartError(
            f"The disk of DATA_DIR {path} has {free:.1f} GB free and {DISK_NEEDED_GB} GB is the least to start with. "
            "Free some space, or choose another folder: make run DATA_DIR=…"
        )


@contextlib.contextmanager
def lock(data_dir: Path) -> Any:
    """One `make run` for a DATA_DIR; StartError names the one that is there. The kernel lets go of it in any case."""
    with (data_dir / "run.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            other = read_state(data_dir)
            raise StartError(
                f"A studio already runs on {data_dir}"
                + (f": {other['address']} (process {other['pid']})." if other else ".")
                + " Stop it first, or choose another folder and port: make run DATA_DIR=… PORT=…"
            ) from error
        try:
            yield
        finally:
            (data_dir / "run.json").unlink(missing_ok=True)


def load_secrets(data_dir: Path) -> dict[str, str]:
    """The secrets of this DATA_DIR, made at the first start, readable by their owner alone."""
    path = data_dir / "secrets.json"
    if not path.exists():
        fresh = {"secret_key": secrets.token_urlsafe(50), "redis_password": secrets.token_hex(24)}
        write_private(path, json.dumps(fresh, indent=1))
    path.chmod(0o600)
    try:
        own = json.loads(path.read_text())
        return {"secret_key": str(own["secret_key"]), "redis_password": str(own["redis_password"])}
    except (ValueError, KeyError, TypeError) as error:
        raise StartError(
            f"{path} is damaged. Bring it back from a backup, or delete it: new ones are made, and all log in again."
        ) from error


def read_state(data_dir: Path) -> dict[str, Any]:
    return read_json(data_dir / "run.json")


def read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def write_private(path: Path, text: str) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    fresh = path.with_name(f"{path.name}.new")
    fresh.unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    file: TextIO
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)
    fresh.replace(path)


def _free_gb(path: Path) -> float:
    return shutil.disk_usage(path).free / 1e9
