"""What the cards show: of each label its examples and health, of each label set its cover."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.db.models import Count, F, OuterRef, Q, Subquery, Window
from django.db.models.functions import Coalesce, RowNumber
from django.urls import reverse
from django.utils.translation import gettext as _

from webapp.accounts.models import User
from webapp.labelsets.models import Classification, Example, Label, LabelSet, PrototypeSet
from webapp.labelsets.results import last_learned, percent
from webapp.library.models import Photo

THUMBS = 14  # of a card
LABELS = 100  # cards of a page
COVER = 5
BATCHES = 12
SETTLED = 0.9
CHOICES = 100  # label sets of a dialog
NO_ID = UUID(int=0)  # stands for an id in an address that a script fills in


@dataclass(frozen=True)
class Chip:
    """A state by icon and word."""

    kind: str
    icon: str
    text: str


@dataclass(frozen=True)
class Card:
    """A label as its set's page shows it."""

    label: Label
    examples: tuple[Example, ...]
    count: int
    expected: float | None
    outlier: UUID | None
    chip: Chip
    is_learning: bool

    @property
    def hidden(self) -> int:
        return self.count - len(self.examples)

    @property
    def expected_percent(self) -> int | None:
        return None if self.expected is None else round(100 * self.expected)

    @property
    def expected_text(self) -> str:
        return "" if self.expected is None else percent(self.expected)


@dataclass(frozen=True)
class Board:
    """The labels column of a label set's page."""

    label_set: LabelSet
    cards: tuple[Card, ...]
    label_count: int
    example_count: int
    next_from: int | None
    learned: PrototypeSet | None
    error: str

    @property
    def is_learning(self) -> bool:
        return bool(self.label_set.version > 1 and not self.error and _is_behind(self.label_set, self.learned))

    @property
    def health(self) -> Chip | None:
        return set_health(self.learned, self.example_count)


@dataclass(frozen=True)
class Cover:
    """A label set on the page of all of them."""

    label_set: LabelSet
    photos: tuple[Photo, ...]
    health: Chip | None
    is_learning: bool


def read_board(label_set: LabelSet, *, first: int = 0) -> Board:
    """The cards of a label set from the `first` label on; `label_set` comes with its model and job."""
    labels = list(Label.objects.current().filter(label_set=label_set)[first : first + LABELS])
    learned = last_learned(label_set.pk)
    totals = (
        Label.objects.current()
        .filter(label_set=label_set)
        .aggregate(labels=Count("pk", distinct=True), examples=Count("examples", filter=Q(examples__to_version=None)))
    )
    shown = _examples_of(labels, THUMBS)
    names = {str(label.pk): label.name for label in labels}
    failed = label_set.job.state == label_set.job.State.FAILED
    after = first + len(labels)
    return Board(
        label_set=label_set,
        cards=tuple(_card(label, shown.get(label.pk, []), learned, names) for label in labels),
        label_count=totals["labels"],
        example_count=totals["examples"],
        next_from=after if after < totals["labels"] else None,
        learned=learned,
        error=(label_set.job.error or _("Learning stopped.")) if failed else "",
    )


def set_health(learned: PrototypeSet | None, example_count: int) -> Chip | None:
    """The accuracy that a label set expects of itself, with its interval; or what it takes to know it."""
    if not example_count:
        return None
    expected = learned.health.get("expected") if learned else None
    if learned is None or expected is None:
        return Chip("", "info", _("Accuracy not known yet"))
    text = _("Expected accuracy %(share)s") % {"share": _with_interval(expected, learned.health.get("ci"))}
    return Chip("good", "check", text) if expected >= 0.8 else Chip("warn", "warning", text)


def _with_interval(expected: float, margin: float | None) -> str:
    """ "75 % ± 4"; where that would reach beyond 100 %, the range that is left: "80–100 %"."""
    share, around = round(100 * expected), max(1, round(100 * margin)) if margin else 0
    if not around:
        return f"{share}\u00a0%"
    if share + around > 100:
        return f"{max(0, share - around)}–100\u00a0%"
    return f"{share}\u00a0%\u00a0±\u00a0{around}"


def with_counts(user: User) -> Any:
    """The user's label sets with `label_count` and `example_count`, the newest first."""
    labels = Label.objects.current().filter(label_set=OuterRef("pk")).order_by().values("label_set")
    current = Example.objects.current().filter(label__label_set=OuterRef("pk"), label__to_version=None)
    examples = current.order_by().values("label__label_set")
    return (
        LabelSet.objects.of(user)
        .select_related("model")
        .annotate(
            label_count=Coalesce(Subquery(labels.annotate(n=Count("pk")).values("n")), 0),
            example_count=Coalesce(Subquery(examples.annotate(n=Count("pk")).values("n")), 0),
        )
        .order_by("-created", "pk")
    )


def read_covers(label_sets: Sequence[LabelSet]) -> list[Cover]:
    """The cards of these label sets, in three queries whatever their number."""
    photos = _cover_photos(label_sets)
    newest: dict[UUID, PrototypeSet] = {}
    rows = PrototypeSet.objects.filter(label_set__in=label_sets).defer("data", "examples").order_by("version")
    for learned in rows:
        newest[learned.label_set_id] = learned
    return [
        Cover(
            label_set=one,
            photos=tuple(photos.get(one.pk, [])),
            health=set_health(newest.get(one.pk), one.example_count),  # type: ignore[attr-defined]
            is_learning=bool(one.example_count) and _is_behind(one, newest.get(one.pk)),  # type: ignore[attr-defined]
        )
        for one in label_sets
    ]


def label_choices(user: User) -> dict[str, Any]:
    """The user's newest label sets, and as `labels` what each has and where photos go, for labelchoice.js."""
    label_sets = list(LabelSet.objects.of(user).order_by("-created")[:CHOICES])
    sets: dict[str, Any] = {
        str(one.pk): {"newLabelUrl": reverse("labelsets:add-label", args=[one.pk]), "labels": []} for one in label_sets
    }
    current = Label.objects.current().filter(label_set__in=label_sets).order_by("name")
    for pk, label_set_id, name in current.values_list("pk", "label_set_id", "name"):
        sets[str(label_set_id)]["labels"].append({"id": str(pk), "name": name})
    labels = {
        "sets": sets,
        "noId": str(NO_ID),
        "addUrl": reverse("labelsets:add-examples", args=[NO_ID]),
        "intakeUrl": reverse("labelsets:label-examples", args=[NO_ID]),
    }
    return {"label_sets": label_sets, "labels": labels}


def recent_batches(label_set: LabelSet) -> Any:
    """The last classifications with this label set, and how many photos each has."""
    return (
        Classification.objects.filter(label_set=label_set)
        .select_related("job")
        .annotate(photo_count=Count("query_images"))
        .order_by("-created")[:BATCHES]
    )


def _is_behind(label_set: LabelSet, learned: PrototypeSet | None) -> bool:
    return learned is None or learned.version < label_set.version or learned.model_id != label_set.model_id


def _examples_of(labels: Sequence[Label], most: int) -> dict[UUID, list[Example]]:
    """The first examples of each label, each with `of`: how many its label has."""
    rows = (
        Example.objects.current()
        .filter(label__in=labels)
        .annotate(
            rank=Window(RowNumber(), partition_by=[F("label_id")], order_by=["created", "id"]),
            of=Window(Count("pk"), partition_by=[F("label_id")]),
        )
        .filter(rank__lte=most)
        .select_related("photo")
        .order_by("label_id", "rank")
    )
    found: dict[UUID, list[Example]] = {}
    for example in rows:
        found.setdefault(example.label_id, []).append(example)
    return found


def _card(label: Label, examples: list[Example], learned: PrototypeSet | None, names: dict[str, str]) -> Card:
    count = examples[0].of if examples else 0  # type: ignore[attr-defined]
    known = (learned.health.get("labels", {}) if learned else {}).get(str(label.pk))
    version = learned.version if learned else 0
    is_learning = bool(examples) and (
        known is None or known["examples"] != count or any(example.from_version > version for example in examples)
    )
    health = known or {}
    outlier = UUID(health["outlier"]) if health.get("outlier") else None
    return Card(
        label=label,
        examples=tuple(examples),
        count=count,
        expected=None if is_learning else health.get("expected"),
        outlier=None if is_learning else outlier,
        chip=_chip(count, is_learning, health, names.get(health.get("confused_with") or "", "")),
        is_learning=is_learning,
    )


def _chip(count: int, is_learning: bool, health: dict[str, Any], rival: str) -> Chip:
    expected = health.get("expected")
    if not count:
        return Chip("warn", "warning", _("Needs a photo"))
    if is_learning:
        return Chip("live", "", _("Learning…"))
    if count == 1:
        return Chip("", "info", _("One example"))
    if rival and expected is not None and expected < SETTLED:
        return Chip("warn", "warning", _("Mixes with %(name)s") % {"name": rival})
    if count == 2:
        return Chip("", "info", _("More would help"))
    if expected is None:
        return Chip("", "info", _("Add another label"))
    if expected < SETTLED:
        return Chip("warn", "warning", _("More would help"))
    return Chip("good", "check", _("Settled"))


def _cover_photos(label_sets: Sequence[LabelSet]) -> dict[UUID, list[Photo]]:
    """Up to five photos of each set, from as many of its labels as can be."""
    rank = Window(RowNumber(), partition_by=[F("label_id")], order_by=["created", "id"])
    rows = (
        Example.objects.current()
        .filter(label__label_set__in=label_sets, label__to_version=None)
        .annotate(rank=rank, set_id=F("label__label_set_id"))
        .filter(rank__lte=COVER)
        .select_related("photo")
        .order_by("rank", "created")
    )
    found: dict[UUID, list[Photo]] = {}
    for example in rows[: COVER * 1000]:
        photos = found.setdefault(example.set_id, [])
        if len(photos) < COVER:
            photos.append(example.photo)
    return found
