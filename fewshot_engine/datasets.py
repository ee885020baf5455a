"""Labelled images, the split into base and validation classes, what an episode can be made of.

Plain Python and numpy: importing this loads no torch.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.errors import ConfigError, DataError

PHOTO_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif")
)
Pixels = NDArray[np.uint8] | Callable[[NDArray[np.int64]], NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Photos with a class each.

    Attributes:
        classes: class names, unique; a nested class is its path, "Alphabet/character".
        labels: (n,) int64, indices into `classes`.
        paths: n file names.
        groups: (n,) or None; photos of one group (identical content, a burst, near copies) never stand on both
            sides of a split or an episode.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    paths: tuple[str, ...]
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        check_labels(self.classes, self.labels, self.groups)
        if len(self.paths) != len(self.labels):
            raise ConfigError(f"{len(self.paths)} paths for {len(self.labels)} labels: each photo has one of both")

    def counts(self) -> dict[str, int]:
        """Class name -> photos that an episode can tell apart (photos of one group count once)."""
        return count_photos(self.classes, self.labels, self.groups)


@dataclass(frozen=True)
class ClassSplit:
    """Which classes are trained on and which are held out, as indices into the classes that were split.

    Attributes:
        validation: where the checkpoint is chosen.
        test: where the final figure is made, and nothing else; empty where there are too few classes.
        way: the ways that the validation classes allow, at most what was asked for.
        optimistic: nothing is held out, because there were too few classes or nobody wanted it; validation repeats the
            base classes, and every figure made on it flatters.
        notes: sentences for people, empty when everything was as asked.
    """

    base: tuple[int, ...]
    validation: tuple[int, ...]
    way: int = 0
    optimistic: bool = False
    notes: tuple[str, ...] = ()
    test: tuple[int, ...] = ()


@dataclass(frozen=True)
class EpisodePlan:
    """The episode that the photos allow: `query` may have shrunk; `left_out` names the classes that are too small."""

    way: int
    shot: int
    query: int
    left_out: tuple[tuple[str, int], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def chance(self) -> float:
        return 1 / self.way

    @property
    def photos(self) -> int:
        """Photos of one episode, support and query together."""
        return self.way * (self.shot + self.query)


@dataclass(frozen=True, eq=False)
class TrainData:
    """What a run learns from.

    Attributes:
        classes: class names.
        labels: (n,) int64, indices into `classes`.
        groups: (n,) or None; see `LabelledImages`.
        embeddings: (n, dim) float32 of the frozen backbone, for *adapt*; may be a memory map.
        pixels: for *full*: (n, s, s, 3) uint8, may be a memory map; or a function from (m,) indices to (m, s, s, 3).
        split: base and validation classes; drawn from the configuration's seed when None.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None
    embeddings: NDArray[np.float32] | None = None
    pixels: Pixels | None = None
    split: ClassSplit | None = None

    def __post_init__(self) -> None:
        check_labels(self.classes, self.labels, self.groups)
        for name, rows in (("embeddings", self.embeddings), ("pixels", self.pixels)):
            if rows is not None and not callable(rows) and len(rows) != len(self.labels):
                raise ConfigError(f"{len(rows)} rows of {name} for {len(self.labels)} labels: each photo has one row")
        if self.embeddings is not None and self.embeddings.ndim != 2:
            raise ConfigError(f"embeddings are of shape {self.embeddings.shape}: they are (n, dim)")

    def counts(self) -> dict[str, int]:
        """Class name -> photos that an episode can tell apart."""
        return count_photos(self.classes, self.labels, self.groups)

    def fingerprint(self) -> str:
        """Says whether two runs learn from the same data: names, labels, groups and a sample of the rows."""
        digest = hashlib.sha256(repr(self.classes).encode())
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        digest.update(b"" if self.groups is None else np.ascontiguousarray(self.groups).tobytes())
        sample = np.unique(np.linspace(0, len(self.labels) - 1, num=64, dtype=np.int64))
        for rows in (self.embeddings, self.pixels):
            if rows is not None:
                digest.update(np.ascontiguousarray(rows(sample) if callable(rows) else rows[sample]).tobytes())
        return digest.hexdigest()


def from_folder(root: str | Path, level: str | int = "leaf") -> LabelledImages:
    """Every photo under a folder of class folders, nested or not; identical files form a group.

    Args:
        root: stray files beside the class folders, hidden files and files without a photo's suffix are passed over.
        level: which folders are the classes: "leaf" (the folder that holds the photo), "top", or a depth from 1.

    Raises:
        DataError: no folder, or no photo in a class folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is not a folder")
    depth = _depth(level)
    found = [(path, _class_of(path.relative_to(root), depth)) for path in _photos(root)]
    found = [(path, name) for path, name in found if name]
    if not found:
        raise DataError(f"{root} holds no photos in class folders: put the photos of each class in a folder of its own")
    classes = tuple(sorted({name for _, name in found}))
    index = {name: number for number, name in enumerate(classes)}
    paths = [path for path, _ in found]
    labels = np.array([index[name] for _, name in found], dtype=np.int64)
    return LabelledImages(classes, labels, tuple(map(str, paths)), _identical_files(paths))


def from_folders(roots: Sequence[str | Path], level: str | int = "leaf") -> LabelledImages:
    """`from_folder` over several roots; where a class name stands in two of them, the root's name goes before it.

    Raises:
        DataError: as `from_folder` does, or two roots have one name and a class in common.
    """
    parts = [from_folder(root, level) for root in roots]
    names = [name for part in parts for name in part.classes]
    if len(set(names)) < len(names):
        names = [f"{Path(root).name}/{name}" for root, part in zip(roots, parts, strict=True) for name in part.classes]
    if len(set(names)) < len(names):
        raise DataError("two folders of the same name hold a class of the same name: rename one of them")
    starts = np.cumsum([0, *(len(part.classes) for part in parts)])
    labels = np.concatenate([part.labels + start for part, start in zip(parts, starts, strict=False)])
    paths = tuple(path for part in parts for path in part.paths)
    return LabelledImages(tuple(names), labels, paths, _identical_files(list(map(Path, paths))))


def split_classes(
    counts: Mapping[str, int] | Sequence[object],
    *,
    share: float,
    way: int,
    seed: int,
    test_share: float = 0.0,
    base_way: int | None = None,
) -> ClassSplit:
    """Hold out classes for validation and test, at random but the same for the same seed.

    Validation gets `share` of the classes and at least `way`; base keeps at least `base_way`. With too few for that,
    validation is evaluated with fewer ways; where not even two classes are left over, validation repeats the base
    classes and the split calls itself optimistic. Test gets `test_share` and at least `way`, if base then still has
    half of all classes.

    Args:
        counts: the classes, by position; their sizes are not looked at. Nested classes are split leaf by leaf.
        share: of the classes, at most 0.5; 0 trains on all of them and says so.
        base_way: `way` where not given.

    Raises:
        DataError: fewer classes than `base_way`.
    """
    if not 0 <= share <= 0.5:
        raise ConfigError(f"validation share is {share}: use a number from 0 to 0.5")
    n, base_way = len(counts), way if base_way is None else base_way
    if n < base_way:
        raise DataError(f"{base_way}-way needs {base_way} classes; this collection has {n}")
    if share == 0:
        note = "No class is held out, as was asked, so the figures come from the classes trained on and are optimistic."
        return ClassSplit(tuple(range(n)), tuple(range(n)), min(way, n), optimistic=True, notes=(note,))
    order = list(range(n))
    random.Random(seed).shuffle(order)  # noqa: S311 -- a split to be repeated, not a secret
    if n - base_way < 2:
        note = (
            f"{n} classes are too few to hold any out of {base_way}-way training, so the figures come from the classes "
            f"trained on and are optimistic; {base_way + way} classes allow an honest estimate."
        )
        everything = tuple(range(n))
        return ClassSplit(everything, everything, min(way, n), optimistic=True, notes=(note,))
    held = min(max(way, round(share * n)), n - base_way)
    tested, notes = _test_size(n - held, n, test_share, way=way, base_way=base_way)
    if held < way:
        note = (
            f"{n} classes leave {held} to hold out, so validation is {held}-way (chance {100 / held:.0f} %) while "
            f"training is {base_way}-way; {base_way + way} classes allow {way}-way validation."
        )
        notes = (note, *notes)
    parts = order[held + tested :], order[:held], order[held : held + tested]
    base, validation, test = (tuple(sorted(part)) for part in parts)
    return ClassSplit(base, validation, min(held, way), notes=notes, test=test)


def _test_size(left: int, n: int, share: float, *, way: int, base_way: int) -> tuple[int, tuple[str, ...]]:
    """Classes to test on, of those that validation has left, and what there is to say about it."""
    if share == 0:
        return 0, ()
    least = max(base_way, math.ceil(n / 2))  # what base keeps
    if left - way >= least:
        return min(max(way, round(share * n)), left - least), ()
    return 0, (
        f"{n} classes are too few to keep {way} for nothing but the final figure, so it is made on the classes that "
        "the checkpoint is chosen by, and is optimistic.",
    )


def split_for(counts: Mapping[str, int], config: TrainConfig) -> ClassSplit:
    """The split that a run needs: of the classes large enough for its episodes, as indices into all of `counts`.

    Raises:
        DataError: as `check_episode` does.
    """
    largest = config.largest_episode
    turns = 4 if config.rotations_as_classes else 1
    needed = replace(largest, way=max(2, math.ceil(largest.way / turns)))
    left_out = {name for name, _ in check_episode(counts, needed).left_out}
    usable = [index for index, name in enumerate(counts) if name not in left_out]
    split = split_classes(
        usable,
        share=config.validation_share,
        test_share=config.test_share,
        way=config.episode.way,
        base_way=needed.way,
        seed=config.seed,
    )
    base, validation, test = (tuple(usable[index] for index in p) for p in (split.base, split.validation, split.test))
    return replace(split, base=base, validation=validation, test=test)


def check_episode(counts: Mapping[str, int], episode: EpisodeConfig) -> EpisodePlan:
    """What episodes these classes allow: who is left out, and how many query images are left for each class.

    Args:
        counts: class name -> photos (groups, where there are any).

    Raises:
        DataError: fewer than N classes have the K + 1 photos that an episode takes at least.
    """
    least = episode.shot + 1
    left_out = tuple((name, count) for name, count in counts.items() if count < least)
    kept = {name: count for name, count in counts.items() if count >= least}
    if len(kept) < episode.way:
        raise DataError(
            f"{episode.way}-way needs {episode.way} classes with at least {least} photos; "
            f"this collection has {len(kept)}"
        )
    smallest = min(kept, key=lambda name: kept[name])
    query = min(episode.query, kept[smallest] - episode.shot)
    notes = []
    if left_out:
        named = ", ".join(f"{name} ({count})" for name, count in left_out[:5])
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        notes.append(f"Left out, with fewer than {least} photos: {named}{more}.")
    if query < episode.query:
        notes.append(
            f"Query images a class are {query} instead of {episode.query}: {smallest} has {kept[smallest]} photos, "
            f"of which {episode.shot} are support."
        )
    return EpisodePlan(episode.way, episode.shot, query, left_out, tuple(notes))


def count_photos(
    classes: Sequence[str], labels: NDArray[np.int64], groups: NDArray[np.int64] | None = None
) -> dict[str, int]:
    """Class name -> photos an episode can tell apart; a group counts once, and only in the class that keeps it."""
    if groups is not None:
        kept = one_class_per_group(labels, groups)
        pairs = np.unique(np.stack([labels[kept], groups[kept]]), axis=1)
        labels = pairs[0]
    sizes = np.bincount(labels, minlength=len(classes))
    return {name: int(size) for name, size in zip(classes, sizes, strict=True)}


def one_class_per_group(labels: NDArray[np.int64], groups: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which photos stay so that no group has photos of two classes: a group stays where most of it is.

    A tie goes to the class with the lower index. After this a split by class cannot tear a group.

    Returns:
        (n,) bool.
    """
    pairs, inverse, sizes = np.unique(np.stack([groups, labels]), axis=1, return_inverse=True, return_counts=True)
    order = np.lexsort((pairs[1], -sizes, pairs[0]))  # by group, then largest, then lowest class
    first = np.ones(len(order), dtype=bool)
    first[1:] = pairs[0][order][1:] != pairs[0][order][:-1]
    winners = np.zeros(len(order), dtype=bool)
    winners[order[first]] = True
    kept: NDArray[np.bool_] = winners[inverse.reshape(-1)]
    return kept


def check_labels(classes: Sequence[str], labels: NDArray[np.int64], groups: NDArray[np.int64] | None) -> None:
    """Raise ConfigError unless labels are indices into unique class names and every photo has its group."""
    if len(set(classes)) != len(classes):
        raise ConfigError(f"{len(classes)} class names, {len(set(classes))} of them different: names are unique")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ConfigError(f"labels are {labels.dtype} of shape {labels.shape}: they are integers of shape (n,)")
    if labels.size and (labels.min() < 0 or labels.max() >= len(classes)):
        raise ConfigError(f"labels run from {labels.min()} to {labels.max()}: there are {len(classes)} classes")
    if groups is not None and groups.shape != labels.shape:
        raise ConfigError(f"{len(groups)} groups for {len(labels)} labels: each photo has one group")


def _depth(level: str | int) -> int | None:
    if level in ("leaf", "top"):
        return None if level == "leaf" else 1
    if re.fullmatch(r"[1-9]\d?", str(level)):
        return int(level)
    raise ConfigError(f"level is {level!r}: it is leaf, top, or a depth from 1")


def _class_of(path: Path, depth: int | None) -> str:
    return "/".join(path.parts[:-1][:depth])


def _photos(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        for name in sorted(names):
            if not name.startswith(".") and Path(name).suffix.lower() in PHOTO_SUFFIXES:
                found.append(Path(folder, name))
    return found


def _identical_files(paths: Sequence[Path]) -> NDArray[np.int64]:
    """(n,) group numbers; files of equal content share one. Only files of equal size are read."""
    by_size: dict[int, list[int]] = {}
    for index, path in enumerate(paths):
        by_size.setdefault(path.stat().st_size, []).append(index)
    groups = np.arange(len(paths), dtype=np.int64)
    for same_size in by_size.values():
        seen: dict[str, int] = {}
        for index in same_size if len(same_size) > 1 else ():
            digest = hashlib.sha256(paths[index].read_bytes()).hexdigest()
            groups[index] = seen.setdefault(digest, index)
    return groups
