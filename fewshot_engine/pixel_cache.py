"""Photos decoded once, for training from pixels: one memory-mapped file on disk, and a journal of what is in it.

Importing this loads no torch; building a cache does.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.checkpoints import write_atomically
from fewshot_engine.errors import DataError, ImageRefused

CACHE_BATCH = 256  # photos decoded between two entries in the journal


@dataclass(frozen=True, eq=False)
class PixelCache:
    """Decoded photos on disk.

    Attributes:
        pixels: (n, size, size, 3) uint8, a read-only memory map; black where a photo was refused.
        readable: (n,) bool.
        refused: (path, reason) of each photo that could not be decoded.
    """

    pixels: NDArray[np.uint8]
    readable: NDArray[np.bool_]
    refused: tuple[tuple[str, str], ...]


def build_pixel_cache(paths: Sequence[str | Path], size: int, out: Path, decode_workers: int = 2) -> Iterator[int]:
    """Decode every photo once into one .npy file, yielding how many are done; a second call goes on where one stopped.

    Threads are enough: Pillow releases the lock while it decodes, and a daemonic worker may not start processes.

    Args:
        size: side of the squares, in pixels, cut as the encoder does.
        out: the .npy file; what is known about each photo stands beside it, in files of the same name.
        decode_workers: threads.
    """
    from fewshot_engine import images
    from fewshot_engine.framing import preprocess

    def decode_one(index: int) -> str | None:
        try:
            pixels[index] = preprocess(images.decode(Path(paths[index]), min_side=size).rgb, size)
        except ImageRefused as error:
            return str(error)
        except OSError as error:
            return f"The file cannot be opened: {error.strerror or error}."
        return None

    journal = _CacheJournal(out, paths, size)
    done = journal.done()
    if len(done) < len(paths) or not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        fresh = not done or not out.exists()
        done = {} if fresh else done
        shape = (len(paths), size, size, 3)
        pixels = np.lib.format.open_memmap(out, "w+" if fresh else "r+", np.uint8, shape if fresh else None)
        waiting = [index for index in range(len(paths)) if index not in done]
        with ThreadPoolExecutor(max(1, decode_workers)) as pool:
            for start in range(0, len(waiting), CACHE_BATCH):
                batch = waiting[start : start + CACHE_BATCH]
                reasons = dict(zip(batch, pool.map(decode_one, batch), strict=True))
                pixels.flush()  # the pixels first, then the line that vouches for them
                done |= reasons
                journal.write(done)
                yield len(done)
    yield len(paths)


def read_pixel_cache(out: Path, paths: Sequence[str | Path], size: int) -> PixelCache:
    """What `build_pixel_cache` made of these paths at this size.

    Raises:
        DataError: it is not there, not finished, or of other photos.
    """
    done = _CacheJournal(out, paths, size).done()
    if len(done) < len(paths) or not out.exists():
        raise DataError(f"{len(done)} of {len(paths)} photos are decoded at {size} px: build the cache first")
    readable = np.array([done[index] is None for index in range(len(paths))], dtype=bool)
    refused = tuple((str(paths[index]), reason) for index, reason in sorted(done.items()) if reason is not None)
    return PixelCache(np.load(out, mmap_mode="r", allow_pickle=False), readable, refused)


class _CacheJournal:
    """Which photos of a cache are decoded, and why the refused ones were; void when photos or size are others."""

    def __init__(self, out: Path, paths: Sequence[str | Path], size: int) -> None:
        self.path = out.with_name(out.name + ".json")
        self.key = hashlib.sha256(json.dumps([size, [str(path) for path in paths]]).encode()).hexdigest()

    def done(self) -> dict[int, str | None]:
        """Index -> reason it was refused for, None where it was not."""
        try:
            kept = json.loads(self.path.read_text())
            return {int(index): reason for index, reason in kept["done"].items()} if kept["key"] == self.key else {}
        except (OSError, ValueError, KeyError, AttributeError):
            return {}

    def write(self, done: Mapping[int, str | None]) -> None:
        write_atomically(self.path, json.dumps({"key": self.key, "done": dict(done)}).encode())
