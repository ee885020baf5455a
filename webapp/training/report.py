"""What the pages say of a run: before it begins, while it goes on, and whether it was worth it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from django.utils.translation import gettext as _
from django.utils.translation import ngettext

from fewshot_engine.config import TrainConfig
from webapp.jobs.models import Event, Job
from webapp.jobs.story import Line, figure, percent, plus_minus, tell
from webapp.library.models import Collection
from webapp.training.forms import BACKBONE_NAMES, TYPICAL
from webapp.training.models import Metric, TrainingRun
from webapp.training.services import TrainingError, notes_for

LOG_LINES = 60


@dataclass(frozen=True)
class Outlook:
    """What a configuration would mean: a sentence of what happens, notes, or why it cannot be."""

    summary: str = ""
    notes: tuple[str, ...] = ()
    refusal: str = ""


def outlook(collection: Collection, config: TrainConfig | None) -> Outlook:
    """For a configuration; None stands for what the form begins with."""
    config = config or TYPICAL
    try:
        notes = notes_for(collection, config)
    except TrainingError as error:
        return Outlook(refusal=str(error))
    episode = config.episode
    summary = _(
        "%(total)s episodes in %(epochs)s. Each draws %(way)d categories with %(shot)d support and up to %(query)d "
        "query images; guessing would be right in %(chance)s."
    ) % {
        "total": figure(config.total_episodes),
        "epochs": ngettext("%(n)d epoch", "%(n)d epochs", config.epochs) % {"n": config.epochs},
        "way": episode.way,
        "shot": episode.shot,
        "query": episode.query,
        "chance": percent(episode.chance),
    }
    return Outlook(summary=summary, notes=tuple(notes))


def duration(seconds: float) -> str:
    """ "4 min 10 s": the two largest units; run.js says it the same way."""
    whole = max(0, round(seconds))
    if whole < 60:
        return _("%(s)d s") % {"s": whole}
    if whole < 3600:
        return _("%(m)d min %(s)d s") % {"m": whole // 60, "s": whole % 60}
    return _("%(h)d h %(m)d min") % {"h": whole // 3600, "m": whole % 3600 // 60}


@dataclass(frozen=True)
class Verdict:
    """Was it worth it? `tone` is good, warn or nothing."""

    headline: str
    text: str
    tone: str = ""


class RunReport:
    """A run as its page and the list tell it; reads what it needs when asked."""

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.config = run.train_config()

    # Figures ----------------------------------------------------------------------------------------

    @property
    def episode_text(self) -> str:
        """ "5-way 5-shot 15-query", as it was really played."""
        played = self.run.baseline or self.run.config["episode"]
        return _("%(way)d-way %(shot)d-shot %(query)d-query") % {
            "way": played["way"],
            "shot": played["shot"],
            "query": played["query"],
        }

    @property
    def way_shot(self) -> str:
        played = self.run.baseline or self.run.config["episode"]
        return _("%(way)d-way %(shot)d-shot") % {"way": played["way"], "shot": played["shot"]}

    @property
    def backbone(self) -> str:
        return str(BACKBONE_NAMES.get(self.config.backbone, self.config.backbone))

    @property
    def chance(self) -> str:
        return percent(1 / (self.run.baseline or self.run.config["episode"])["way"])

    @cached_property
    def _tested(self) -> dict[str, Any]:
        """What a finished run says of classes that were used for nothing else, where there were enough of them."""
        card: dict[str, Any] = self.run.model.card if self.run.model else {}
        return card if card.get("test") and card.get("test_baseline") else {}

    @property
    def score(self) -> dict[str, Any] | None:
        """The figure to quote: of the test classes, else the best on the validation classes."""
        found: dict[str, Any] | None = self._tested.get("test") or self.run.best
        return found

    @property
    def untrained(self) -> dict[str, Any] | None:
        """The backbone before any training, on the episodes of `score`."""
        found: dict[str, Any] | None = self._tested.get("test_baseline") or self.run.baseline
        return found

    @property
    def is_tested(self) -> bool:
        """Is the score of classes that were used for nothing else?"""
        return bool(self._tested)

    @property
    def accuracy(self) -> str:
        return figure(100 * self.score["accuracy"], 1) if self.score else ""

    @property
    def ci95(self) -> str:
        return figure(100 * self.score["ci95"], 1) if self.score else ""

    @property
    def best_text(self) -> str:
        return plus_minus(self.score) if self.score else ""

    @property
    def baseline_text(self) -> str:
        return plus_minus(self.untrained) if self.untrained else ""

    @property
    def baseline_percent(self) -> str:
        return percent(self.run.baseline["accuracy"]) if self.run.baseline else ""

    @property
    def baseline_ci95(self) -> str:
        return figure(100 * self.run.baseline["ci95"], 1) if self.run.baseline else ""

    @property
    def bars(self) -> list[tuple[str, str, str, str]]:
        """(tone, name, width, text) of what is compared; the width is for a meter, so in no language's digits."""
        played = self.run.baseline or self.run.config["episode"]
        name = _("adapted") if self.config.kind == "adapt" else _("trained")
        rows = []
        if self.score:
            rows.append(("tone-1", name, f"{100 * self.score['accuracy']:.1f}", self.best_text))
        if self.untrained:
            width = f"{100 * self.untrained['accuracy']:.1f}"
            rows.append(("tone-4", _("untrained"), width, self.baseline_text))
        rows.append(("tone-faint", _("guessing"), f"{100 / played['way']:.1f}", self.chance))
        return rows

    @property
    def class_count(self) -> int:
        plan = self.run.plan
        kinds = ("base_classes", "validation_classes", "test_classes")
        return len({name for kind in kinds for name in plan.get(kind, ())})

    @property
    def gain(self) -> float | None:
        """In points, over the untrained backbone."""
        if not self.score or not self.untrained:
            return None
        return 100 * float(self.score["accuracy"] - self.untrained["accuracy"])

    @property
    def gain_text(self) -> str:
        if self.gain is None:
            return ""
        points = figure(abs(self.gain), 1)
        if self.gain >= 0.05:
            return _("%(points)s above the untrained backbone") % {"points": points}
        if self.gain <= -0.05:
            return _("%(points)s below the untrained backbone") % {"points": points}
        return _("as good as the untrained backbone")

    @property
    def is_optimistic(self) -> bool:
        return bool((self.run.baseline or {}).get("optimistic"))

    @property
    def held_out(self) -> list[str]:
        """The classes that are never trained on; `test_classes` are among them."""
        validation = [] if self.is_optimistic else list(self.run.plan.get("validation_classes", ()))
        return validation + self.test_classes

    @property
    def test_classes(self) -> list[str]:
        """Those that were used for nothing but the final figure."""
        return list(self.run.plan.get("test_classes", ()))

    @property
    def left_out(self) -> list[tuple[str, int]]:
        return [(name, count) for name, count in self.run.plan.get("left_out", ())]

    # The course ---------------------------------------------------------------------------------------

    @cached_property
    def last_step(self) -> dict[str, Any]:
        event = Event.objects.filter(job_id=self.run.job_id, type="step").order_by("-number").first()
        return event.data if event else {}

    @property
    def loss(self) -> str:
        return figure(self.last_step["loss"], 2) if self.last_step else ""

    @property
    def guessing_loss(self) -> str:
        """The cross-entropy of guessing: ln N."""
        return figure(math.log((self.run.baseline or self.run.config["episode"])["way"]), 2)

    @property
    def speed(self) -> str:
        rate = self.last_step.get("episodes_per_s", 0)
        return figure(rate, 0 if rate >= 10 else 1) if rate else ""

    @property
    def time_left(self) -> str:
        left = self.last_step.get("seconds_left")
        return duration(left) if left is not None and self.run.job.state == Job.State.RUNNING else ""

    @property
    def time_taken(self) -> str:
        job = self.run.job
        return duration((job.finished - job.started).total_seconds()) if job.finished and job.started else ""

    @property
    def percent(self) -> int:
        return 100 if self.run.job.state == Job.State.SUCCEEDED else self.run.job.percent

    @property
    def epoch(self) -> int:
        return min(self.config.epochs, self.run.job.done // self.config.episodes_per_epoch + 1)

    @cached_property
    def evaluations(self) -> list[Metric]:
        return list(self.run.metrics.filter(kind=Metric.Kind.EVALUATION))

    @cached_property
    def log(self) -> list[Line]:
        """The newest lines, oldest first; of the evaluations that were not the best, the last one alone."""
        told = Event.objects.filter(job_id=self.run.job_id).exclude(type__in=("step", "saved")).order_by("-number")
        events = list(told[:LOG_LINES])
        newest = next((event for event in events if event.type == "evaluation"), None)
        kept = [e for e in events if e.type != "evaluation" or e.data.get("best") or e is newest]
        lines: dict[str, Line] = {}
        for line in tell(reversed(kept)):
            lines.setdefault(line.text, line)  # what the end says again is said once
        return list(lines.values())

    @property
    def warnings(self) -> int:
        return sum(line.tone in ("warn", "bad") for line in self.log)

    # Worth it? ----------------------------------------------------------------------------------------

    @property
    def verdict(self) -> Verdict:
        if self.gain is None:
            return Verdict(
                _("Not known yet"), _("The first evaluation will tell, on classes that are never trained on.")
            )
        is_done = self.run.job.state == Job.State.SUCCEEDED
        if is_done and self.run.recommends == "frozen":
            return Verdict(
                _("No"),
                _(
                    "The backbone as it came does as well or better on classes it has not seen. "
                    "Keep using it: your label sets need no change."
                ),
                "warn",
            )
        words = {
            "points": figure(abs(self.gain), 1),
            "n": int((self.untrained or {}).get("episodes", 0)),
            "way_shot": self.way_shot,
        }
        if self.gain <= 0:
            return Verdict(
                _("Not so far"),
                _("%(points)s points below the backbone as it came, on the same %(n)d episodes.") % words,
                "warn",
            )
        text = _("%(points)s points over the backbone as it came, on the same %(n)d episodes of %(way_shot)s.") % words
        margin = 100 * math.hypot(self.score["ci95"], self.untrained["ci95"])  # type: ignore[index]  # a gain has both
        if self.gain <= margin:
            return Verdict(
                _("Hardly") if is_done else _("Hardly so far"), text + " " + _("That may be chance."), "warn"
            )
        return Verdict(_("Yes") if is_done else _("Yes, so far"), text, "good")

    @property
    def stalled_for(self) -> int:
        """Evaluations since the best one, when that is three or more."""
        best_at = (self.run.best or {}).get("episode")
        since = sum(1 for metric in self.evaluations if best_at is not None and metric.episode > best_at)
        return since if since >= 3 else 0
