"""A classification as CSV or JSON, written row by row while it is sent."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from django.utils.text import slugify

from webapp.labelsets.models import Classification
from webapp.labelsets.results import KNOWN, NONE, WAITING, judged

KINDS = {"csv": "text/csv; charset=utf-8", "json": "application/json"}
CHUNK = 500
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class Row:
    """What is told of one photo. `best` is [(label, confidence, distance), …], best first."""

    file: str
    category: str
    verdict: str
    label: str
    confidence: float | None
    distance: float | None
    stranger: float | None
    answered_by_person: bool
    best: list[tuple[str, float, float]]


def file_name(batch: Classification, kind: str) -> str:
    return f"{slugify(batch.name) or 'results'}.{kind}"


async def stream(batch: Classification, kind: str) -> AsyncIterator[str]:
    """The file in pieces; `batch` comes with its label set."""
    write = _as_csv if kind == "csv" else _as_json
    async for piece in write(batch):
        yield piece


async def _as_csv(batch: Classification) -> AsyncIterator[str]:
    yield _line(_head(batch.top_k))
    async for row in _rows(batch):
        best = [cell for entry in row.best for cell in (safe(entry[0]), *map(_number, entry[1:]))]
        values = (row.confidence, row.distance, row.stranger)
        yield _line(
            [
                safe(row.file),
                safe(row.category),
                row.verdict,
                safe(row.label),
                *map(_number, values),
                "yes" if row.answered_by_person else "no",
                *best,
            ]
        )


async def _as_json(batch: Classification) -> AsyncIterator[str]:
    about = {"label_set": batch.label_set.name, "batch": batch.name, "created": batch.created.isoformat()}
    about |= {"turn_away_above": batch.label_set.reject_above}  # type: ignore[dict-item]
    yield json.dumps(about, ensure_ascii=False)[:-1] + ', "results": ['
    comma = "\n"
    async for row in _rows(batch):
        yield comma + json.dumps(_as_object(row), ensure_ascii=False)
        comma = ",\n"
    yield "\n]}\n"


def safe(text: str) -> str:
    """A cell that no spreadsheet takes for a formula."""
    return f"'{text}" if text.startswith(FORMULA) else text


async def _rows(batch: Classification) -> AsyncIterator[Row]:
    names = {str(pk): name async for pk, name in batch.label_set.labels.values_list("pk", "name")}
    fields = ("photo__name", "photo__category__path", "verdict", "is_answered", "answer_id", "group_label")
    found = judged(batch).order_by("photo__category__path", "photo__name", "pk")
    found = found.values(*fields, "current__label_id", "current__stranger", "current__top_k")
    async for values in found.aiterator(chunk_size=CHUNK):
        yield _row(values, names, batch.top_k)


def _row(values: dict[str, Any], names: dict[str, str], top_k: int) -> Row:
    ranked = {key: (confidence, distance) for key, confidence, distance in values["current__top_k"] or []}
    verdict = values["verdict"]
    label = str(values["group_label"] if verdict == KNOWN else values["current__label_id"] or "")
    if verdict in (NONE, WAITING):
        label = ""
    confidence, distance = ranked.get(label, (None, None))
    best = [(names.get(key, ""), c, d) for key, (c, d) in list(ranked.items())[:top_k]]
    return Row(
        file=values["photo__name"],
        category=values["photo__category__path"] or "",
        verdict=verdict,
        label=names.get(label, ""),
        confidence=confidence,
        distance=distance,
        stranger=values["current__stranger"],
        answered_by_person=values["is_answered"],
        best=best,
    )


def _as_object(row: Row) -> dict[str, Any]:
    best = [{"label": name, "confidence": c, "distance": d} for name, c, d in row.best]
    return {**row.__dict__, "best": best}


def _head(top_k: int) -> list[str]:
    best = [f"{what}_{n}" for n in range(1, top_k + 1) for what in ("label", "confidence", "distance")]
    return ["file", "category", "verdict", "label", "confidence", "distance", "stranger", "answered_by_person", *best]


def _line(cells: list[str]) -> str:
    out = io.StringIO()
    csv.writer(out).writerow(cells)
    return out.getvalue()


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"
