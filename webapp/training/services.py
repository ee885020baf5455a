"""Runs begin here, and here the worker brings back what they made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import Avg, Count, F, Max
from django.utils.translation import gettext as _

from fewshot_engine.config import TrainConfig
from webapp.accounts.models import User
from webapp.jobs.models import Event, Job
from webapp.jobs.services import Claim, create_job, fenced, record, retry, wake
from webapp.library.models import Category, Collection, Import
from webapp.training.models import Metric, Model, TrainingRun

USUAL_WAYS, GOOD_CLASSES, GOOD_PHOTOS = 5, 20, 20
CURVE_POINTS = 600
KEPT_STEPS, THINNED_EVERY = 300, 50  # lines of a run's log that tell of steps


class TrainingError(Exception):
    """A run that cannot begin; the text is meant for the person."""


def class_sizes(collection: Collection) -> dict[int, tuple[str, int]]:
    """Category id -> (path, photos of its own); categories that hold no photos themselves are no classes."""
    rows = collection.categories.annotate(n=Count("photos")).filter(n__gt=0).order_by("key")
    return {pk: (path, n) for pk, path, n in rows.values_list("pk", "path", "n")}


@dataclass(frozen=True)
class Readiness:
    """What a collection's class sizes allow: `level` is good, warn or bad."""

    classes: int
    photos: int
    large: int
    level: str
    sentence: str


def readiness(sizes: Iterable[int]) -> Readiness:
    """Is training on classes of these sizes worth it? The bounds are the specification's."""
    counts = list(sizes)
    large = sum(n >= GOOD_PHOTOS for n in counts)
    if sum(n > 1 for n in counts) < USUAL_WAYS:
        level, sentence = (
            "bad",
            _(
                "Episodes usually take %(ways)d categories; training pays off from about %(classes)d with %(photos)d "
                "photos each."
            )
            % {"ways": USUAL_WAYS, "classes": GOOD_CLASSES, "photos": GOOD_PHOTOS},
        )
    elif large >= 2 * GOOD_CLASSES:
        level, sentence = "good", _("Many categories with enough photos: what is learned will carry over.")
    elif large >= GOOD_CLASSES:
        level, sentence = "good", _("Enough to train on; more categories would carry over better to new ones.")
    else:
        level, sentence = (
            "warn",
            _("Training pays off from about %(classes)d categories with %(photos)d photos each.")
            % {"classes": GOOD_CLASSES, "photos": GOOD_PHOTOS},
        )
    return Readiness(len(counts), sum(counts), large, level, sentence)


def sizes_of(collections: Sequence[Collection]) -> dict[UUID, list[int]]:
    """Collection id -> photos of each of its classes, in one query."""
    found: dict[UUID, list[int]] = {collection.pk: [] for collection in collections}
    rows = Category.objects.filter(collection__in=collections).annotate(n=Count("photos")).filter(n__gt=0)
    for pk, n in rows.order_by().values_list("collection_id", "n"):
        found[pk].append(n)
    return found


def notes_for(collection: Collection, config: TrainConfig) -> list[str]:
    """What this configuration means for this collection: who is left out, how far Q shrinks.

    Raises:
        TrainingError: the collection does not allow it, with the numbers and the way out.
    """
    episode = config.episode
    sizes = class_sizes(collection)
    least = episode.shot + 1
    usable = {path: n for path, n in sizes.values() if n >= least}
    if len(usable) < episode.way:
        raise TrainingError(
            _(
                "%(way)d-way %(shot)d-shot needs %(way)d categories with at least %(least)d photos each; "
                "“%(name)s” has %(have)d of %(all)d. Choose fewer ways or shots, or add photos."
            )
            % {
                "way": episode.way,
                "shot": episode.shot,
                "least": least,
                "name": collection.name,
                "have": len(usable),
                "all": len(sizes),
            }
        )
    notes = []
    if collection.imports.exclude(state=Import.State.DONE).exists():
        notes.append(
            _("An upload into this collection is not finished: the run learns from the %(n)s photos that are there.")
            % {"n": f"{sum(n for _path, n in sizes.values()):,}"}
        )
    small = [(path, n) for path, n in sizes.values() if n < least]
    if small:
        named = ", ".join(f"{path} ({n})" for path, n in small[:5]) + ("…" if len(small) > 5 else "")
        notes.append(
            _("%(n)d categories have fewer than %(least)d photos and are left out: %(names)s.")
            % {"n": len(small), "least": least, "names": named}
        )
    smallest = min(usable.values())
    if smallest < episode.shot + episode.query:
        notes.append(
            _("The smallest category has %(n)d photos, so an episode has %(q)d query images a class, not %(asked)d.")
            % {"n": smallest, "q": smallest - episode.shot, "asked": episode.query}
        )
    if len(usable) < 2 * episode.way:
        notes.append(
            _("With %(n)d categories, too few are left to hold out %(way)d for an honest estimate; %(need)d would do.")
            % {"n": len(usable), "way": episode.way, "need": 2 * episode.way}
        )
    return notes


def start_run(
    owner: User, collection: Collection, config: TrainConfig, *, name: str = "", key: str | None = None
) -> TrainingRun:
    """Freeze a configuration and wake the training queue; with a key, pressing twice gives the same run.

    Raises:
        TrainingError: the collection does not allow the configuration.
    """
    if key and (existing := TrainingRun.objects.filter(owner=owner, job__key=key).first()):
        return existing
    notes_for(collection, config)
    name = " ".join(name.split())[:120] or collection.name
    with transaction.atomic():
        job = create_job(
            owner, Job.Kind.TRAIN, queue=Job.Queue.TRAINING, title=_("Training %(name)s") % {"name": name}, key=key
        )
        run, is_new = TrainingRun.objects.get_or_create(
            job=job, defaults={"owner": owner, "name": name, "collection": collection, "config": config.to_dict()}
        )
        if is_new:
            Job.objects.filter(pk=job.pk).update(url=run.get_absolute_url(), total=config.total_episodes)
            wake(job.pk)
    return run


def continue_run(run: TrainingRun) -> None:
    """Go on with a run that failed or was cancelled, from its last checkpoint.

    Raises:
        TrainingError: it did neither, or there is nothing left to learn from.
    """
    if run.collection is None and not run.checkpoint:
        raise TrainingError(_("The photos that it would learn from were deleted for good. Start a new one."))
    if not retry(run.job):
        raise TrainingError(_("There is nothing to go on with: the run is finished, or goes on already."))


def rename_run(run: TrainingRun, name: str) -> None:
    """Name a run, its job and the model it made."""
    name = " ".join(name.split())[:120]
    if not name:
        raise TrainingError(_("A run needs a name."))
    with transaction.atomic():
        TrainingRun.objects.filter(pk=run.pk).update(name=name)
        Model.objects.filter(run=run).update(name=name)
        Job.objects.filter(pk=run.job_id).update(title=(_("Training %(name)s") % {"name": name})[:200])


def curves(run: TrainingRun) -> dict[str, Any]:
    """What the charts draw: every evaluation, and the steps averaged into at most CURVE_POINTS."""
    total = run.train_config().total_episodes
    evaluations = run.metrics.filter(kind=Metric.Kind.EVALUATION).values_list("episode", "accuracy", "ci95")
    steps = (
        run.metrics.filter(kind=Metric.Kind.STEP)
        .order_by()
        .values(bucket=F("episode") * CURVE_POINTS / total)
        .annotate(last=Max("episode"), mean=Avg("loss"))
        .order_by("last")
        .values_list("last", "mean")
    )
    return {
        "total": total,
        "way": (run.baseline or run.config["episode"])["way"],
        "baseline": run.baseline["accuracy"] if run.baseline else None,
        "evaluations": [list(row) for row in evaluations],
        "steps": [[episode, round(loss, 5)] for episode, loss in steps],
    }


# What the worker brings back ----------------------------------------------------------------------


def save_start(
    claim: Claim,
    run: TrainingRun,
    *,
    plan: dict[str, Any],
    baseline: dict[str, Any],
    notes: Sequence[str],
    resumed_at: int,
) -> None:
    """What a run begins with, or goes on with: points after the checkpoint are drawn anew."""
    with fenced(claim, done=resumed_at):
        TrainingRun.objects.filter(pk=run.pk).update(plan=plan, baseline=baseline)
        run.metrics.filter(episode__gt=resumed_at).delete()
        record(claim.job_id, "started", plan=plan, baseline=baseline, notes=list(notes), resumed_at=resumed_at)


def save_checkpoint(claim: Claim, run: TrainingRun, name: str, *, episode: int) -> list[str]:
    """Make a checkpoint of this attempt the one that counts; returns the names of those that do no longer."""
    with fenced(claim):
        before = TrainingRun.objects.values_list("checkpoint", flat=True).get(pk=run.pk)
        TrainingRun.objects.filter(pk=run.pk).update(checkpoint=name)
        record(claim.job_id, "saved", episode=episode)
    return [before] if before and before != name else []


def save_metric(
    claim: Claim, run: TrainingRun, kind: Metric.Kind, *, episode: int, changes: dict[str, Any], event: dict[str, Any]
) -> None:
    """A point of the curves, once however often its episode is run, with the job's progress and its event."""
    with fenced(claim, **changes):
        values: dict[str, Any] = {name: event[name] for name in ("epoch", "loss", "accuracy", "ci95") if name in event}
        Metric.objects.update_or_create(run=run, kind=kind, episode=episode, defaults=values)
        if event.get("best"):
            best = {name: event[name] for name in ("accuracy", "ci95", "way", "shot", "query", "episodes")}
            TrainingRun.objects.filter(pk=run.pk).update(best={**best, "episode": episode})
        line = record(claim.job_id, str(kind), episode=episode, **event)
        if kind == Metric.Kind.STEP and line.number % THINNED_EVERY == 0:
            # The metrics have every step; their lines are for pages that listen now.
            Event.objects.filter(job=claim.job_id, type="step", number__lte=line.number - KEPT_STEPS).delete()


def save_model(claim: Claim, run: TrainingRun, *, folder: str, card: dict[str, Any], event: dict[str, Any]) -> Model:
    """Register what a finished run has made; running this again replaces it."""
    config = run.train_config()
    with fenced(claim):
        kind = Model.Kind.ADAPT if config.kind == "adapt" else Model.Kind.FULL
        model = Model.objects.filter(run=run).first() or Model(owner_id=run.owner_id, name=run.name, kind=kind)
        model.backbone = config.backbone if config.kind == "adapt" else f"model-{run.pk}"
        model.folder, model.card = folder, card
        model.save()
        TrainingRun.objects.filter(pk=run.pk).update(
            model=model, recommends=event["recommends"], best=event["best"], baseline=event["baseline"]
        )
        record(claim.job_id, "finished", **event)
    return model
