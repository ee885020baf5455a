"""How a classification reads: verdicts by the thresholds of now, groups of tiles, and the evidence for one photo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from uuid import UUID

from django.db.models import Case, CharField, Count, F, FilteredRelation, FloatField, Q, UUIDField, Value, When, Window
from django.db.models.functions import Coalesce, RowNumber
from django.urls import reverse
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.labelsets.models import Classification, Label, PrototypeSet, QueryImage
from webapp.library.models import ImportFile, Photo

UNSURE_BELOW = 0.6  # as in fewshot_engine.inference.verdict, which the site does not import
TILES = 48  # of a group
GROUPS = 15  # of a fragment
GROUP_PAGE = 240  # tiles of a group that is shown alone
KEYS = 9  # answers that have a key of their own

WAITING, UNSURE, NONE, KNOWN = "waiting", "unsure", "none", "known"
SPECIAL = (WAITING, UNSURE, NONE)


@dataclass(frozen=True)
class Tile:
    """A photo among the results."""

    photo_id: UUID
    name: str
    query_id: int
    caption: str
    spoken: str
    is_answered: bool
    is_waiting: bool

    @property
    def thumbnail_url(self) -> str:
        return reverse("library:photo-file", args=[self.photo_id, "thumb"])


@dataclass(frozen=True)
class Group:
    """Photos with one answer. `key` is a verdict (waiting, unsure, none), or the id of a label."""

    key: str
    name: str
    count: int
    tone: int
    tiles: tuple[Tile, ...]
    next_after: int | None = None  # where the next page of the group begins, when it is shown alone

    @property
    def is_cut(self) -> bool:
        return self.count > len(self.tiles)


@dataclass(frozen=True)
class Results:
    """What the results pane shows of a classification."""

    classification: Classification
    counts: dict[str, int]
    groups: tuple[Group, ...]
    group_count: int
    first: int
    shown_group: str
    incoming: int
    unsent: int
    learned: PrototypeSet | None

    @property
    def total(self) -> int:
        return sum(self.counts.values()) + self.incoming

    @property
    def done(self) -> int:
        return sum(self.counts.values()) - self.counts.get(WAITING, 0)

    @property
    def is_live(self) -> bool:
        return self.classification.job.is_active or self.incoming > 0

    @property
    def error(self) -> str:
        job = self.classification.job
        return (job.error or _("The classification stopped.")) if job.state == job.State.FAILED else ""

    @property
    def is_stale(self) -> bool:
        """Do the answers come from an older version of the label set, with nothing under way to change that?"""
        batch, learned = self.classification, self.learned
        is_new = (
            learned is not None and learned.version == batch.label_set.version and learned.pk != batch.prototypes_id
        )
        return is_new and self.done > 0 and not batch.job.is_active

    @property
    def is_learning(self) -> bool:
        return self.learned is None or self.learned.version < self.classification.label_set.version

    @property
    def next_first(self) -> int | None:
        after = self.first + len(self.groups)
        return after if not self.shown_group and after < self.group_count else None

    @property
    def summary(self) -> str:
        """One sentence for whoever hears the page instead of seeing it."""
        parts = [ngettext("%(n)d photo classified", "%(n)d photos classified", self.done) % {"n": self.done}]
        if unsure := self.counts.get(UNSURE):
            parts.append(_("%(n)d not sure") % {"n": unsure})
        if none := self.counts.get(NONE):
            parts.append(_("%(n)d none of these") % {"n": none})
        return ", ".join(parts) + "."


@dataclass(frozen=True)
class Bar:
    label: Label
    confidence: float
    distance: float

    @property
    def percent(self) -> str:
        return _likely(self.confidence)


@dataclass(frozen=True)
class Neighbour:
    """One of the examples that lie nearest to the photo."""

    photo: Photo
    label: Label
    similarity: float
    is_rival: bool


@dataclass(frozen=True)
class Choice:
    label: Label
    key: int
    is_first: bool


@dataclass(frozen=True)
class Evidence:
    """Why a photo got its answer, and what a person can answer instead."""

    query: QueryImage
    verdict: str
    limit: float
    bars: tuple[Bar, ...]
    stranger: float | None
    neighbours: tuple[Neighbour, ...]
    choices: tuple[Choice, ...]
    others: tuple[Label, ...]

    @property
    def photo(self) -> Photo:
        return self.query.photo

    @property
    def is_open(self) -> bool:
        """Has nobody answered yet?"""
        return not self.query.is_answered

    @property
    def is_none(self) -> bool:
        return self.verdict == NONE

    @property
    def stranger_text(self) -> str:
        return percent(self.stranger or 0)

    @property
    def title(self) -> str:
        if self.verdict == WAITING:
            return _("Looking…")
        if self.verdict == NONE:
            return _("Why none of these?")
        if self.verdict == UNSURE:
            return _("Why not sure?")
        label = self.query.answer if self.query.is_answered else self.bars[0].label
        return _("Why “%(name)s”?") % {"name": label}

    @property
    def why(self) -> str:
        if self.query.is_answered:
            return self._said_by_person()
        if self.verdict == WAITING:
            return _("It has not been looked at yet; the answer comes by itself.")
        best = self.bars[0]
        if self.verdict == NONE:
            return _(
                "The chance that it is none of your labels is %(stranger)s, above your limit of %(limit)s. "
                "The nearest label is %(name)s."
            ) % {"stranger": percent(self.stranger or 0), "limit": percent(self.limit), "name": best.label}
        if len(self.bars) < 2:
            return _("It is the only label, and the photo lies close enough to its examples.")
        words = {"name": best.label, "other": self.bars[1].label, "limit": percent(UNSURE_BELOW)}
        words |= {"a": best.percent, "b": self.bars[1].percent}
        if self.verdict == UNSURE:
            return _("%(name)s has %(a)s against %(b)s for %(other)s; below %(limit)s it counts as not sure.") % words
        return _("It lies nearest to the examples of %(name)s: %(a)s, against %(b)s for %(other)s.") % words

    def _said_by_person(self) -> str:
        said = (
            _("You said that it is %(name)s.") % {"name": self.query.answer}
            if self.query.answer
            else _("You said that it is none of these.")
        )
        if not self.bars:
            return said
        return said + " " + _("The nearest label is %(name)s.") % {"name": self.bars[0].label}


def percent(share: float) -> str:
    """42 %, with a space that does not break; never 100 % of what is not certain."""
    if 0.995 <= share < 1:
        return ">\u00a099\u00a0%"
    if 0 < share < 0.005:
        return "<\u00a01\u00a0%"
    return f"{round(100 * share)}\u00a0%"


def _likely(confidence: float) -> str:
    """A confidence that was rounded to 0 or 1 is no certainty either."""
    return percent(min(max(confidence, 0.0001), 0.9999))


def judged(classification: Classification) -> Any:
    """Its query images with what is said of each now, decided in the database:

    `verdict` (waiting, unsure, none, known), `group_label` (id of the label, for known ones), `current` (the
    prediction of the current revision) and `score`, by which a group is sorted, the highest first.
    """
    limit = classification.label_set.reject_above
    return (
        classification.query_images.annotate(
            current=FilteredRelation("predictions", condition=Q(predictions__revision=classification.revision))
        )
        .annotate(
            verdict=Case(
                When(is_answered=True, answer=None, then=Value(NONE)),
                When(is_answered=True, then=Value(KNOWN)),
                When(current__id=None, then=Value(WAITING)),
                When(current__stranger__gt=limit, then=Value(NONE)),
                When(current__confidence__lt=UNSURE_BELOW, then=Value(UNSURE)),
                default=Value(KNOWN),
                output_field=CharField(),
            )
        )
        .annotate(
            group_label=Case(
                When(verdict=KNOWN, then=Coalesce(F("answer_id"), F("current__label_id"))), output_field=UUIDField()
            ),
            score=Case(
                When(verdict=UNSURE, then=-F("current__confidence")),
                When(verdict=NONE, then=Coalesce(F("current__stranger"), Value(0.0))),
                default=Coalesce(F("current__confidence"), Value(0.0)),
                output_field=FloatField(),
            ),
        )
    )


SORTED = ("is_answered", "-score", "pk")


def read_results(
    classification: Classification, *, first: int = 0, shown_group: str = "", after: int | None = None
) -> Results:
    """The groups of a classification from the `first` on; or one of them alone, from the tile `after` on."""
    reading = _Reading(classification)
    keys = reading.sorted_keys
    if shown_group:
        groups = [reading.whole_group(shown_group, after)] if shown_group in reading.counts else []
    else:
        groups = reading.groups(keys[first : first + GROUPS])
    incoming, unsent = _under_way(classification)
    return Results(
        classification=classification,
        counts=reading.counts,
        groups=tuple(groups),
        group_count=len(keys),
        first=first,
        shown_group=shown_group,
        incoming=incoming,
        unsent=unsent,
        learned=last_learned(classification.label_set_id),
    )


def read_evidence(query: QueryImage) -> Evidence:
    """All that is known of one photo of a classification; `query` comes with its photo, answer, batch and set."""
    batch = query.classification
    row = (
        judged(batch).filter(pk=query.pk).values("verdict", "current__stranger", "current__top_k", "current__evidence")
    )
    found = row.get()
    labels = {str(label.pk): label for label in batch.label_set.labels.all()}
    ranked = found["current__top_k"] or []
    bars = [Bar(labels[key], c, d) for key, c, d in ranked[: batch.top_k] if key in labels]
    current = [label for label in labels.values() if label.to_version is None]
    best = [labels[key] for key, _c, _d in ranked if key in labels and labels[key].to_version is None]
    ordered = list(dict.fromkeys([*best, *current]))
    return Evidence(
        query=query,
        verdict=found["verdict"],
        limit=batch.label_set.reject_above,
        bars=tuple(bars),
        stranger=found["current__stranger"],
        neighbours=tuple(_neighbours(found["current__evidence"] or [], labels)),
        choices=tuple(Choice(label, n + 1, n == 0 and label in best) for n, label in enumerate(ordered[:KEYS])),
        others=tuple(sorted(ordered[KEYS:], key=lambda label: label.name.casefold())),
    )


def last_learned(label_set_id: UUID) -> PrototypeSet | None:
    """The newest prototypes of a label set, without their bytes."""
    return PrototypeSet.objects.filter(label_set=label_set_id).defer("data", "examples").order_by("-version").first()


class _Reading:
    """The counts of a classification's groups, and the tiles of some of them."""

    def __init__(self, classification: Classification) -> None:
        self.classification = classification
        self.queries = judged(classification)
        rows = self.queries.order_by().values("verdict", "group_label").annotate(n=Count("pk"))
        self.counts = {_key(row["verdict"], row["group_label"]): row["n"] for row in rows}

    @cached_property
    def labels(self) -> dict[str, Label]:
        return {str(label.pk): label for label in self.classification.label_set.labels.all()}

    @property
    def sorted_keys(self) -> list[str]:
        """Waiting, not sure, none of these, then the labels, those with most photos first."""
        special = [key for key in SPECIAL if key in self.counts]
        known = [key for key in self.counts if key not in SPECIAL]
        return special + sorted(known, key=lambda key: (-self.counts[key], self.labels[key].name.casefold()))

    def groups(self, keys: Sequence[str]) -> list[Group]:
        if not keys:
            return []
        rows = self.queries.filter(_any_of(keys)).order_by(*SORTED)
        if any(self.counts[key] > TILES for key in keys):  # ranking costs as much as all the rest: only where it cuts
            rank = Window(RowNumber(), partition_by=[F("verdict"), F("group_label")], order_by=SORTED)
            rows = rows.annotate(rank=rank).filter(rank__lte=TILES)
        tiles: dict[str, list[Tile]] = {key: [] for key in keys}
        for row in self._values(rows):
            tiles[_key(row["verdict"], row["group_label"])].append(self._tile(row))
        return [self._group(key, tiles[key]) for key in keys]

    def whole_group(self, key: str, after: int | None) -> Group:
        rows = self.queries.filter(_any_of([key])).order_by(*SORTED)
        if after is not None:
            rows = rows.filter(self._beyond(after))
        found = list(self._values(rows)[: GROUP_PAGE + 1])
        tiles = [self._tile(row) for row in found[:GROUP_PAGE]]
        return self._group(key, tiles, next_after=tiles[-1].query_id if len(found) > GROUP_PAGE else None)

    def _beyond(self, after: int) -> Q:
        """What is sorted behind a tile, wherever that tile stands by now."""
        row = self.queries.filter(pk=after).values("is_answered", "score").first()
        if row is None:
            return Q()
        answered, score = row["is_answered"], row["score"]
        behind = Q(is_answered=answered, score__lt=score) | Q(is_answered=answered, score=score, pk__gt=after)
        return behind if answered else behind | Q(is_answered=True)

    @staticmethod
    def _values(rows: Any) -> Any:
        fields = ("pk", "photo_id", "photo__name", "is_answered", "verdict", "group_label")
        return rows.values(*fields, "current__confidence", "current__label_id")

    def _group(self, key: str, tiles: list[Tile], next_after: int | None = None) -> Group:
        label = self.labels.get(key)
        names = {WAITING: _("Being looked at"), UNSURE: _("Not sure"), NONE: _("None of these")}
        name = names[key] if label is None else label.name
        return Group(key, name, self.counts[key], label.tone if label else 0, tuple(tiles), next_after)

    def _tile(self, row: dict[str, Any]) -> Tile:
        nearest = self.labels.get(str(row["current__label_id"]))
        caption = self._caption(row, nearest)
        verdicts = {WAITING: _("being looked at"), UNSURE: _("not sure"), NONE: _("none of these")}
        said = verdicts.get(row["verdict"]) or self.labels[str(row["group_label"])].name
        return Tile(
            photo_id=row["photo_id"],
            name=row["photo__name"],
            query_id=row["pk"],
            caption=caption,
            spoken=f"{row['photo__name']}: {said}" + (f", {caption}" if caption else ""),
            is_answered=row["is_answered"],
            is_waiting=row["verdict"] == WAITING,
        )

    @staticmethod
    def _caption(row: dict[str, Any], nearest: Label | None) -> str:
        if row["verdict"] == WAITING or nearest is None:
            return _("by you") if row["is_answered"] else ""
        if row["is_answered"] and row["group_label"] != nearest.pk:
            return _("by you")
        if row["verdict"] == NONE:
            return _("near %(name)s") % {"name": nearest}
        confidence = _likely(row["current__confidence"])  # before the name: a long one is cut, the figure never
        return f"{confidence} {nearest}" if row["verdict"] == UNSURE else confidence


def _key(verdict: str, label_id: UUID | None) -> str:
    return str(label_id) if verdict == KNOWN else verdict


def _any_of(keys: Sequence[str]) -> Q:
    special = [key for key in keys if key in SPECIAL]
    return Q(verdict__in=special) | Q(verdict=KNOWN, group_label__in=[UUID(k) for k in keys if k not in SPECIAL])


def _under_way(classification: Classification) -> tuple[int, int]:
    """How many dropped files are being looked at, and how many were announced but never came."""
    if classification.source != Classification.Source.DROP:
        return 0, 0
    files = ImportFile.objects.filter(batch__intake__classification=classification)
    state = ImportFile.State
    counts = files.aggregate(
        incoming=Count("pk", filter=Q(state=state.STORED)), unsent=Count("pk", filter=Q(state=state.WANTED))
    )
    return counts["incoming"], counts["unsent"]


def _neighbours(evidence: Sequence[Any], labels: dict[str, Label]) -> list[Neighbour]:
    """The nearest examples whose photos are still there: at most two of the answer, two of the runner-up."""
    photos = Photo.objects.in_bulk([row[0] for row in evidence])
    found: list[Neighbour] = []
    answer = evidence[0][1] if evidence else None
    for photo_id, label_id, similarity in evidence:
        photo, label = photos.get(UUID(photo_id)), labels.get(label_id)
        is_full = sum(n.label == label for n in found) >= 2
        if photo is not None and label is not None and not is_full:
            found.append(Neighbour(photo, label, similarity, is_rival=label_id != answer))
    return found
