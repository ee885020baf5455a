"""Files that are there when a row says so: written aside, flushed to the disk, then named."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from django.core.files.base import File
from django.core.files.storage import FileSystemStorage

CHUNK = 256 * 1024


class DurableStorage(FileSystemStorage):
    """Django's file storage, but a name appears only once all of its bytes are on the disk; an existing one is kept."""

    def _save(self, name: str, content: File[bytes]) -> str:
        path = Path(self.path(name))
        temporary = self.temporary(path.parent)
        try:
            with temporary.open("wb") as out:
                for chunk in content.chunks(CHUNK):
                    out.write(chunk)
                _flush(out)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return str(name).replace("\\", "/")

    def adopt(self, path: Path, name: str) -> None:
        """Give a file that `receive` wrote in this storage's folder its name; one that has the name already stays."""
        target = Path(self.path(name))
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        return name  # names are made from contents: the same name is the same bytes

    def temporary(self, folder: Path) -> Path:
        """A new name beside where a file shall be, for writing; the janitor removes what stays under it."""
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f".{uuid.uuid4().hex}.part"


@dataclass(frozen=True)
class Received:
    """Bytes that came in: where they lie for now, and what they are."""

    path: Path
    sha256: str
    size: int


def receive(chunks: Iterable[bytes], path: Path) -> Received:
    """Write chunks to the path, flushed, and hash them on the way."""
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as out:
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
            out.write(chunk)
        _flush(out)
    return Received(path, digest.hexdigest(), size)


def _flush(out: object) -> None:
    out.flush()  # type: ignore[attr-defined]
    os.fsync(out.fileno())  # type: ignore[attr-defined]
