"""The log of a job in sentences: what a person reads where a machine wrote numbered events."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from django.utils.formats import number_format
from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from webapp.jobs.models import Event


@dataclass(frozen=True)
class Line:
    """A sentence of a log; `tone` is good, warn, bad or nothing."""

    at: datetime
    text: str
    tone: str = ""


def tell(events: Iterable[Event]) -> list[Line]:
    """The events as lines, oldest first; those that say nothing to a person are left out."""
    lines = []
    for event in events:
        for text in _TELLERS.get(event.type, _message)(event.data):
            if text:
                lines.append(Line(event.at, text, _TONES.get(event.type, "")))
    return lines


def figure(value: float, digits: int = 0) -> str:
    """A number in the reader's language, rounded; Django's own `number_format` cuts digits off."""
    return str(number_format(round(value, digits), digits, force_grouping=True))


def percent(share: float) -> str:
    """0.714 -> "71.4 %", which no line break tears."""
    return f"{figure(100 * share, 1)}\N{NO-BREAK SPACE}%"


def plus_minus(score: dict[str, Any]) -> str:
    """ "71.4 % ± 0.9"."""
    return f"{percent(score['accuracy'])} ± {figure(100 * score['ci95'], 1)}"


Data = dict[str, Any]


def _message(data: Data) -> list[str]:
    return [str(data.get("message") or data.get("error") or "")]


def _failed(data: Data) -> list[str]:
    return [data.get("error") or _("It failed, and the log of the worker says why.")]


def _started(data: Data) -> list[str]:
    plan = data["plan"]
    held_out = len(plan.get("validation_classes", ())) + len(plan.get("test_classes", ()))
    classes = held_out + len(plan.get("base_classes", ()))
    if data.get("resumed_at"):
        return [_("Going on from episode %(n)s.") % {"n": figure(data["resumed_at"])}]
    lines = [
        _("Held %(held)d of %(all)d classes out; no photo of theirs is trained on.")
        % {"held": held_out, "all": classes}
    ]
    if data["baseline"].get("optimistic"):
        lines = [_("There are too few classes to hold any out, so the figures flatter.")]
    lines.append(
        _("The untrained backbone has %(score)s on %(way)d-way %(shot)d-shot; guessing has %(chance)s.")
        % {
            "score": plus_minus(data["baseline"]),
            "way": data["baseline"]["way"],
            "shot": data["baseline"]["shot"],
            "chance": percent(1 / data["baseline"]["way"]),
        }
    )
    return lines + [str(note) for note in data.get("notes", ())]


def _evaluation(data: Data) -> list[str]:
    words = {"score": plus_minus(data), "n": figure(data["episode"])}
    if data["episode"] == 0:
        return [_("Before the first episode, in closed form: %(score)s.") % words]
    if data.get("best"):
        return [_("New best: %(score)s after %(n)s episodes.") % words]
    return [_("%(score)s after %(n)s episodes, not better than before.") % words]


def _saved(data: Data) -> list[str]:
    return [_("Checkpoint kept at episode %(n)s.") % {"n": figure(data["episode"])}]


def _finished(data: Data) -> list[str]:
    return [str(note) for note in data.get("notes", ())]


def _preparing(data: Data) -> list[str]:
    if data.get("done") != data.get("total"):
        return []
    return [
        ngettext("%(n)d photo is ready.", "%(n)d photos are ready.", data["total"]) % {"n": data["total"]}
        if data.get("total")
        else data.get("message", "")
    ]


def _photos(data: Data) -> list[str]:
    counts = data.get("counts", {})
    return [
        _("%(accepted)d photos accepted so far, %(refused)d refused.")
        % {"accepted": counts.get("accepted", 0), "refused": counts.get("refused", 0)}
    ]


def _prototypes(data: Data) -> list[str]:
    return [_("Learned version %(n)s.") % {"n": data.get("version")}]


def _predictions(data: Data) -> list[str]:
    return [_("%(done)s of %(total)s photos answered.") % {"done": data.get("done"), "total": data.get("total")}]


def _silent(data: Data) -> list[str]:
    return []


_TELLERS: dict[str, Callable[[Data], list[str]]] = {
    "started": _started,
    "evaluation": _evaluation,
    "saved": _saved,
    "finished": _finished,
    "preparing": _preparing,
    "photos": _photos,
    "prototypes": _prototypes,
    "predictions": _predictions,
    "failed": _failed,
    "step": _silent,
    "idle": _silent,
    "answered": _silent,
}
_TONES = {"failed": "bad", "retrying": "warn", "stopping": "warn", "cancelled": "warn", "succeeded": "good"}
