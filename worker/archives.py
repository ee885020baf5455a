"""Zips, which are hostile until shown otherwise: never extracted, entries streamed under caps, names made by us."""

from __future__ import annotations

import io
import stat
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO

from django.conf import settings
from django.core.files.storage import default_storage
from django.utils.translation import gettext as _

from webapp.library.models import Blob, Import, ImportFile
from webapp.library.services import Entry, clean_path, judge_entry, keep_blobs, register_archived
from webapp.library.storage import CHUNK, receive
from worker.leases import Lease

MAX_ENTRIES = 200_000
MAX_RATIO = 100  # of an entry's size to its packed size, for entries over a megabyte: photos hardly pack at all
AT_ONCE = 64


class Chunks(io.RawIOBase):
    """The chunks of an uploaded zip, read as one file."""

    def __init__(self, batch: Import) -> None:
        self.batch = batch
        self.position = 0
        self._open: tuple[int, IO[bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.batch.archive_size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self.position >= self.batch.archive_size:
            return 0
        number, offset = divmod(self.position, settings.ZIP_CHUNK_BYTES)
        file = self._chunk(number)
        file.seek(offset)
        data = file.read(len(buffer))
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def close(self) -> None:
        if self._open is not None:
            self._open[1].close()
            self._open = None
        super().close()

    def _chunk(self, number: int) -> IO[bytes]:
        if self._open is None or self._open[0] != number:
            if self._open is not None:
                self._open[1].close()
            self._open = number, default_storage.open(self.batch.chunk_name(number))
        return self._open[1]


def take_in(lease: Lease, batch: Import) -> Iterator[int]:
    """Store the photos of a batch's zip, some entries at a time, from where it stands; yields how far it is."""
    with io.BufferedReader(Chunks(batch), buffer_size=1 << 20) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield from _take_entries(lease, batch, archive)
        except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, EOFError, ValueError) as error:
            _refuse_rest(lease, batch, _("The zip is damaged: %(why)s") % {"why": error})


def discard(batch: Import) -> None:
    """The chunks of a zip that is taken in are needed no more."""
    for number in range(batch.archive_chunks):
        default_storage.delete(batch.chunk_name(number))


def _take_entries(lease: Lease, batch: Import, archive: zipfile.ZipFile) -> Iterator[int]:
    entries = [info for info in archive.infolist() if not info.is_dir()]
    if problem := _problem(batch, entries):
        _refuse_rest(lease, batch, problem)
        return
    root = _common_root([info.filename for info in entries])
    used: set[str] = set()
    budget = settings.MAX_ZIP_BYTES
    for start in range(0, len(entries), AT_ONCE):
        chunk = entries[start : start + AT_ONCE]
        files = [judge_entry(batch, Entry(_name(info, root, used), info.file_size)) for info in chunk]
        if start + len(chunk) <= batch.archive_next:
            continue  # taken in before the worker was stopped
        blobs: dict[str, Blob] = {}
        for info, row in zip(chunk, files, strict=True):
            if row.state == ImportFile.State.WANTED:
                _store(archive, info, row, batch, blobs, budget)
                budget -= min(info.file_size, settings.MAX_PHOTO_BYTES)
        register_archived(lease.claim, batch, files, blobs, upto=start + len(chunk))
        yield start + len(chunk)


def _store(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, row: ImportFile, batch: Import, blobs: dict[str, Blob], budget: int
) -> None:
    """Stream one entry to the disk; what it says of its size is not believed."""
    refusal = _suspicion(info, budget)
    if not refusal:
        owner_id = batch.collection.owner_id
        folder = Path(default_storage.path(f"incoming/{owner_id}/file")).parent
        path = default_storage.temporary(folder)  # type: ignore[attr-defined]
        try:
            with archive.open(info) as data:
                received = receive(_bounded(data, min(settings.MAX_PHOTO_BYTES, info.file_size)), path)
            row.size = received.size
            (blobs[row.path],) = keep_blobs(owner_id, [received])
            return
        except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the disk's trouble, not the entry's
            refusal = _("It is damaged in the zip: %(why)s") % {"why": error}
        except Exception as error:  # zlib and lzma have errors of their own
            refusal = _("It is damaged in the zip: %(why)s") % {"why": error}
        finally:
            path.unlink(missing_ok=True)
    row.state, row.reason = ImportFile.State.REFUSED, refusal[:300]


def _suspicion(info: zipfile.ZipInfo, budget: int) -> str:
    if info.flag_bits & 0x1:
        return _("It is encrypted; unpack the zip and choose its folder instead.")
    if stat.S_ISLNK(info.external_attr >> 16):
        return _("A link, no photo.")
    if info.file_size > 1_000_000 and info.file_size > MAX_RATIO * max(1, info.compress_size):
        return _("It unpacks to %(ratio)d times its size, which no photo does.") % {
            "ratio": info.file_size // max(1, info.compress_size)
        }
    if info.file_size > budget:
        return _("The zip unpacks to more than %(gb)d GB, the most that is taken at once.") % {
            "gb": settings.MAX_ZIP_BYTES // 1024**3
        }
    return ""


def _problem(batch: Import, entries: Sequence[zipfile.ZipInfo]) -> str:
    """What is wrong with the zip as a whole; empty when nothing is."""
    if len(entries) > MAX_ENTRIES:
        return _("The zip has %(n)d entries; at most %(most)d are taken at once.") % {
            "n": len(entries),
            "most": MAX_ENTRIES,
        }
    placed = sorted(entries, key=lambda info: info.header_offset)
    for before, after in pairwise(placed):
        if before.header_offset + before.compress_size > after.header_offset:
            return _("Entries of the zip overlap, as they do in zip bombs; it was not taken.")
    if not entries:
        return _("The zip has no files in it.")
    return ""


def _bounded(data: IO[bytes], limit: int) -> Iterator[bytes]:
    total = 0
    while chunk := data.read(CHUNK):
        total += len(chunk)
        if total > limit:
            raise ValueError(_("it is larger than the zip says"))
        yield chunk


def _common_root(names: Sequence[str]) -> str:
    """The one folder that holds everything, when there are folders in it; its name is the collection's, not a class."""
    kept = [name for name in names if not name.startswith("__MACOSX/")]
    first = kept[0].partition("/")[0] + "/" if kept else ""
    is_root = all(name.startswith(first) for name in kept) and any("/" in name[len(first) :] for name in kept)
    return first if is_root else ""


def _name(info: zipfile.ZipInfo, root: str, used: set[str]) -> str:
    """The entry's path below the root; a name that comes twice is told apart by a number."""
    path = info.filename.replace("\0", "").removeprefix(root)[:900]
    if not clean_path(path):
        path = "unnamed"
    unique, n = path, 2
    while unique in used:
        unique, n = f"{path} ({n}){Path(path).suffix}", n + 1
    used.add(unique)
    return unique


def _refuse_rest(lease: Lease, batch: Import, why: str) -> None:
    row = ImportFile(
        batch=batch,
        path=batch.archive_name or "zip",
        size=batch.archive_size,
        state=ImportFile.State.REFUSED,
        reason=why[:300],
    )
    register_archived(lease.claim, batch, [row], {}, upto=batch.archive_next)
