"""What pages show of collections: covers, the tree of categories, a page of photos, whether training is worth it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any
from uuid import UUID

from django.db.models import Case, Count, IntegerField, OuterRef, Q, Subquery, When
from django.db.models.functions import Coalesce
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.accounts.models import User
from webapp.library.models import Category, Collection, Import, ImportFile, Photo

COVER = 5
PAGE = 120
NAMED = 4  # categories that a sentence names
REPORTED = 60  # files that a card lists

# The specification's bounds: level, categories, photos in each.
LEVELS = (("excellent", 50, 100), ("good", 30, 50), ("minimum", 15, 20))
TRAINABLE = (5, 6)


@dataclass(frozen=True)
class Shelf:
    """A collection as a card shows it."""

    collection: Collection
    photos: tuple[Photo, ...]
    readiness: Readiness

    @property
    def photo_count(self) -> int:
        return self.readiness.photos

    @property
    def category_count(self) -> int:
        return self.readiness.categories


@dataclass(frozen=True)
class Branch:
    """A line of the category tree; `total` counts the photos of the categories below, too."""

    category: Category
    own: int
    total: int
    children: int

    @property
    def indent(self) -> int:
        return min(4, self.category.depth)


@dataclass(frozen=True)
class Tree:
    branches: tuple[Branch, ...]
    photos: int

    @property
    def unlabelled(self) -> int:
        return self.photos - sum(branch.own for branch in self.branches)

    @property
    def classes(self) -> list[Branch]:
        """The categories that have photos of their own: what a training can tell apart."""
        return [branch for branch in self.branches if branch.own]


@dataclass(frozen=True)
class Point:
    """A line of the to-do list before training."""

    text: str
    is_done: bool


@dataclass(frozen=True)
class Readiness:
    """What the sizes of a collection's categories allow. `level`: excellent, good, minimum, small, or none."""

    level: str
    photos: int
    categories: int
    smallest: int
    largest: int
    points: tuple[Point, ...]

    @property
    def chip(self) -> tuple[str, str, str]:
        """Its kind, icon and words."""
        words = {
            "excellent": ("good", "check", _("Ready for training: excellent")),
            "good": ("good", "check", _("Ready for training: good")),
            "minimum": ("good", "check", _("Ready for training")),
            "small": ("warn", "warning", _("Small for training")),
            "none": ("", "info", _("Not for training yet")),
        }
        return words[self.level]

    @property
    def open_points(self) -> int:
        return sum(not point.is_done for point in self.points)


@dataclass(frozen=True)
class PhotoPage:
    photos: tuple[Photo, ...]
    last: int
    has_more: bool


def shelves(collections: Iterable[Collection]) -> list[Shelf]:
    """The cards of these collections, in three queries whatever their number."""
    collections = list(collections)
    sizes: dict[UUID, list[int]] = {collection.pk: [] for collection in collections}
    rows = Photo.objects.filter(collection__in=collections).order_by()
    for pk, category, n in rows.values_list("collection", "category").annotate(n=Count("pk")):
        sizes[pk].append(n if category else -n)  # the unlabelled ones count, but are no category
    covers = _covers({pk: sum(map(abs, counts)) for pk, counts in sizes.items()})
    return [
        Shelf(
            collection,
            tuple(covers.get(collection.pk, [])),
            readiness([n for n in sizes[collection.pk] if n > 0], photos=sum(map(abs, sizes[collection.pk]))),
        )
        for collection in collections
    ]


def collections_of(user: User) -> Any:
    return Collection.objects.of(user).shown().order_by("-created", "pk")


def read_tree(collection: Collection) -> Tree:
    """All categories with their counts, in two queries."""
    own = Photo.objects.filter(category=OuterRef("pk")).order_by().values("category").annotate(n=Count("pk"))
    counted = Coalesce(Subquery(own.values("n"), output_field=IntegerField()), 0)
    rows = list(collection.categories.annotate(own=counted))
    rows.sort(key=lambda category: category.key.split("/"))  # a folder's own line stands right above those below it
    totals: dict[int, int] = {category.pk: category.own for category in rows}
    children: dict[int, int] = dict.fromkeys(totals, 0)
    for category in sorted(rows, key=lambda category: -category.depth):
        if category.parent_id in totals:
            totals[category.parent_id] += totals[category.pk]
            children[category.parent_id] += 1
    branches = tuple(Branch(c, c.own, totals[c.pk], children[c.pk]) for c in rows)
    return Tree(branches, collection.photos.count())


def read_photos(collection: Collection, within: Sequence[int] | None, *, unlabelled: bool, after: int) -> PhotoPage:
    """The next photos after a serial number, in the order in which they came; `within` are ids of categories."""
    photos = collection.photos.filter(serial__gt=after).select_related("blob", "category").order_by("serial")
    if unlabelled:
        photos = photos.filter(category=None)
    elif within is not None:
        photos = photos.filter(category__in=within)
    found = list(photos[: PAGE + 1])
    shown = found[:PAGE]
    return PhotoPage(tuple(shown), shown[-1].serial if shown else after, len(found) > PAGE)


def readiness(sizes: Sequence[int], *, photos: int, names: Sequence[str] = ()) -> Readiness:
    """Judge the class sizes by the specification's bounds; `names` go with `sizes` where they shall be said."""
    level = _level(sizes)
    _name, classes, each = next((one for one in reversed(LEVELS) if one[0] not in _reached(level)), LEVELS[0])
    large = sum(n >= each for n in sizes)
    few = sorted((n, name) for n, name in zip(sizes, names, strict=False) if n < each)
    points = [
        Point(
            _("%(wanted)d categories or more; so far %(have)d.") % {"wanted": classes, "have": len(sizes)},
            len(sizes) >= classes,
        ),
        Point(
            _("%(each)d photos or more in %(wanted)d of them; so far in %(large)d.")
            % {"each": each, "wanted": classes, "large": large},
            large >= classes,
        ),
    ]
    if names and few:
        points.append(Point(_too_small(few, each), False))
    return Readiness(
        level=level,
        photos=photos,
        categories=len(sizes),
        smallest=min(sizes, default=0),
        largest=max(sizes, default=0),
        points=tuple(points),
    )


def telling_names(branches: Sequence[Branch]) -> list[str]:
    """The name of each category; its path where another has the same name."""
    times = Counter(branch.category.name for branch in branches)
    return [b.category.path if times[b.category.name] > 1 else b.category.name for b in branches]


def latest_import(collection: Collection) -> Import | None:
    return collection.imports.select_related("job", "collection").order_by("-created").first()


def untaken(batch: Import) -> Any:
    """The files that made no new photo or have something said about them, refusals first."""
    files = batch.files.filter(
        Q(state__in=(ImportFile.State.REFUSED, ImportFile.State.DUPLICATE, ImportFile.State.SKIPPED))
        | (Q(state=ImportFile.State.ACCEPTED) & ~Q(reason=""))
    )
    refused_first = Case(When(state=ImportFile.State.REFUSED, then=0), default=1)
    return files.order_by(refused_first, "pk")


def _covers(counts: dict[UUID, int]) -> dict[UUID, list[Photo]]:
    """Up to five photos of each collection, spread over it so that several categories are seen."""
    wanted = [
        Q(collection=pk, serial__in={1 + (n * count) // COVER for n in range(COVER)})
        for pk, count in counts.items()
        if count
    ]
    found: dict[UUID, list[Photo]] = {}
    if wanted:
        for photo in Photo.objects.filter(reduce(or_, wanted)).order_by("serial"):
            found.setdefault(photo.collection_id, []).append(photo)
    return found


def _level(sizes: Sequence[int]) -> str:
    for name, classes, each in LEVELS:
        if sum(n >= each for n in sizes) >= classes:
            return name
    classes, each = TRAINABLE
    return "small" if sum(n >= each for n in sizes) >= classes else "none"


def _reached(level: str) -> list[str]:
    names = [name for name, _classes, _each in LEVELS]
    return names[names.index(level) :] if level in names else []


def _too_small(few: Sequence[tuple[int, str]], each: int) -> str:
    named = ", ".join(f"{name} {n}" for n, name in few[:NAMED])
    more = _(" and others") if len(few) > NAMED else ""
    return ngettext(
        "%(n)d category has under %(each)d photos: %(named)s%(more)s.",
        "%(n)d categories have under %(each)d photos: %(named)s%(more)s.",
        len(few),
    ) % {"n": len(few), "each": each, "named": named, "more": more}
