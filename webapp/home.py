"""What the first page shows: the newest of everything, and the one step that helps most now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.accounts.models import User
from webapp.labelsets.cards import Cover, read_covers, with_counts
from webapp.library.models import Photo
from webapp.library.shelf import Shelf, collections_of, shelves
from webapp.training.models import TrainingRun

SHOWN = 6
GOOD_EXAMPLES = 5


@dataclass(frozen=True)
class Step:
    """The next useful step: a sentence, where it is done, and photos that show what it is about."""

    text: str
    action: str
    url: str
    photos: tuple[Photo, ...] = ()


@dataclass(frozen=True)
class Home:
    shelves: tuple[Shelf, ...]
    covers: tuple[Cover, ...]
    has_more_collections: bool
    has_more_label_sets: bool
    next: Step | None

    @property
    def is_new(self) -> bool:
        return not self.shelves and not self.covers

    @property
    def photo_count(self) -> int:
        return sum(shelf.photo_count for shelf in self.shelves)


def read_home(user: User) -> Home:
    collections = list(collections_of(user)[: SHOWN + 1])
    label_sets = list(with_counts(user)[: SHOWN + 1])
    shown = tuple(shelves(collections[:SHOWN]))
    covers = tuple(read_covers(label_sets[:SHOWN]))
    has_run = TrainingRun.objects.filter(owner=user).exists()
    return Home(
        shelves=shown,
        covers=covers,
        has_more_collections=len(collections) > SHOWN,
        has_more_label_sets=len(label_sets) > SHOWN,
        next=next_step(shown, covers, has_run=has_run),
    )


def next_step(collections: Sequence[Shelf], label_sets: Sequence[Cover], *, has_run: bool) -> Step | None:
    """What would help most now, or None while there is nothing yet."""
    if not collections and not label_sets:
        return None  # the three steps say it
    empty = next((shelf for shelf in collections if not shelf.photo_count), None)
    filled = next((shelf for shelf in collections if shelf.photo_count), None)
    if empty and not filled and not label_sets:
        text = _("“%(name)s” has no photos yet. Drop a folder on it.") % {"name": empty.collection.name}
        return Step(text, _("Add photos"), empty.collection.get_absolute_url())
    if not label_sets:
        text = _("Name the things that you want told apart, and give each a few photos: that is a label set.")
        return Step(text, _("Make a label set"), reverse("labelsets:list"), filled.photos if filled else ())
    return _teach(label_sets) or _train(collections, has_run=has_run) or _sort(label_sets)


def _teach(label_sets: Sequence[Cover]) -> Step | None:
    """A label set that lacks labels or examples."""
    for cover in label_sets:
        one = cover.label_set
        labels, examples = one.label_count, one.example_count  # type: ignore[attr-defined]
        if labels < 2:
            text = _("“%(name)s” needs two labels or more to tell photos apart.") % {"name": one.name}
            return Step(text, _("Add labels"), one.get_absolute_url())
        if examples < labels:
            text = ngettext(
                "The %(n)d label of “%(name)s” has %(examples)d examples so far. One to ten each make it work.",
                "The %(n)d labels of “%(name)s” have %(examples)d examples so far. One to ten each make it work.",
                labels,
            ) % {"n": labels, "name": one.name, "examples": examples}
            return Step(text, _("Give examples"), one.get_absolute_url(), cover.photos)
    few = next((c for c in label_sets if c.label_set.example_count < 2 * c.label_set.label_count), None)  # type: ignore[attr-defined]
    if few is None:
        return None
    text = _("“%(name)s” works with %(examples)d examples. A second one for each label helps most.") % {
        "name": few.label_set.name,
        "examples": few.label_set.example_count,  # type: ignore[attr-defined]
    }
    return Step(text, _("Give examples"), few.label_set.get_absolute_url(), few.photos)


def _sort(label_sets: Sequence[Cover]) -> Step | None:
    """Everything is there: what it was made for, or what it still confuses."""
    ready = next((cover for cover in label_sets if cover.health and cover.health.kind == "good"), None)
    if ready:
        text = _("“%(name)s” is ready. Drop new photos, and it sorts them.") % {"name": ready.label_set.name}
        return Step(text, _("Sort new photos"), ready.label_set.get_absolute_url(), ready.photos)
    weak = next((cover for cover in label_sets if cover.health and cover.health.kind == "warn"), None)
    if weak is None:
        return None
    text = _("“%(name)s” still mixes up labels. More examples of those it confuses help most.") % {
        "name": weak.label_set.name
    }
    return Step(text, _("Give examples"), weak.label_set.get_absolute_url(), weak.photos)


def _train(collections: Sequence[Shelf], *, has_run: bool) -> Step | None:
    shelf = next((one for one in collections if one.readiness.level != "none"), None)
    if has_run or shelf is None:
        return None
    text = ngettext(
        "“%(name)s” has %(n)d category. A model trained on it may tell your labels apart better.",
        "“%(name)s” has %(n)d categories. A model trained on them may tell your labels apart better.",
        shelf.category_count,
    ) % {"name": shelf.collection.name, "n": shelf.category_count}
    return Step(text, _("Train on it"), f"{reverse('training:new')}?collection={shelf.collection.pk}", shelf.photos)
