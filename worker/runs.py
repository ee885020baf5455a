"""Training runs: rows become what the engine trains on, its reports become rows.

What a run learns from is frozen at its first attempt; every attempt writes a checkpoint of its own, and the row names
the one that counts, so a worker that lost its lease cannot spoil what its successor goes on from.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from django.core.files.storage import default_storage
from django.utils.translation import gettext as _

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.errors import DataError
from fewshot_engine.pixel_cache import build_pixel_cache, read_pixel_cache
from fewshot_engine.reports import Evaluated, Finished, Pretrained, Report, Saved, Started, Step
from fewshot_engine.training import meta_train
from webapp.jobs.models import Job
from webapp.jobs.services import finish, hand_back, report
from webapp.library.models import Blob, Photo
from webapp.training.models import Metric, TrainingRun
from webapp.training.services import class_sizes, save_checkpoint, save_metric, save_model, save_start
from worker import runtime, vectors
from worker.convert import FrozenPhotos
from worker.intake import embed_missing
from worker.leases import Lease

LOOK_EVERY_S = 1.0
PIXELS = "pixels.npy"


def train(lease: Lease) -> None:
    """Run, or go on with, a training run until it is finished, cancelled, or the worker is asked to leave."""
    run = TrainingRun.objects.select_related("collection", "job").get(job_id=lease.claim.job_id)
    config = run.train_config()
    folder = Path(default_storage.path(run.folder))
    folder.mkdir(parents=True, exist_ok=True)
    data = _data(lease, run, config, folder)
    resume = folder / run.checkpoint if run.checkpoint else None
    checkpoint = folder / f"attempt-{lease.claim.attempt}.safetensors"
    reports = meta_train(config, data, checkpoint=checkpoint, resume=resume, save_now=lambda: lease.should_leave)
    looked_at = time.monotonic()
    for item in reports:
        _keep(lease, run, item)
        if isinstance(item, Finished):
            break
        if lease.is_lost:
            return
        if time.monotonic() - looked_at >= LOOK_EVERY_S:
            looked_at = time.monotonic()
            if lease.is_cancelled:
                finish(lease.claim, Job.State.CANCELLED, message=_("Cancelled; what was learned so far is kept."))
                return
        if lease.should_leave and isinstance(item, Saved):
            hand_back(lease.claim)
            return
    finish(lease.claim, Job.State.SUCCEEDED, message=_("Finished."))
    (folder / PIXELS).unlink(missing_ok=True)


def _data(lease: Lease, run: TrainingRun, config: TrainConfig, folder: Path) -> TrainData:
    """What the run learns from: embeddings for *adapt*, a cache of decoded pixels for *full*."""
    frozen = FrozenPhotos.load(folder) or _freeze(run, folder)
    blobs = Blob.objects.in_bulk(frozen.blob_ids)
    ordered = [blobs[blob_id] for blob_id in frozen.blob_ids if blob_id in blobs]
    if config.kind == "adapt":
        embed_missing(lease.claim, ordered, config.backbone)
        there, embeddings = vectors.read(config.backbone, frozen.blob_ids)
        return TrainData(frozen.classes, frozen.labels[there], groups=frozen.groups[there], embeddings=embeddings)
    return _pixels(lease, frozen, [default_storage.path(blob.original_name) for blob in ordered], config, folder)


def _pixels(lease: Lease, frozen: FrozenPhotos, paths: list[str], config: TrainConfig, folder: Path) -> TrainData:
    """Every photo decoded once, whatever the number of epochs; goes on where a stopped attempt left it."""
    if len(paths) != len(frozen.labels):
        raise DataError(_("Photos that this run began with are gone; start a new one."))
    cache = folder / PIXELS
    told_at = 0.0
    for done in build_pixel_cache(paths, config.image_size, cache, decode_workers=runtime.CORES):
        if time.monotonic() - told_at >= LOOK_EVERY_S:
            told_at = time.monotonic()
            message = _("Decoding photos: %(n)d of %(all)d") % {"n": done, "all": len(paths)}
            report(lease.claim, "preparing", changes={"message": message}, done=done, total=len(paths))
    found = read_pixel_cache(cache, paths, config.image_size)
    if found.readable.all():
        return TrainData(frozen.classes, frozen.labels, groups=frozen.groups, pixels=found.pixels)
    good = found.readable
    return TrainData(frozen.classes, frozen.labels[good], groups=frozen.groups[good], pixels=found.pixels[good])


def _freeze(run: TrainingRun, folder: Path) -> FrozenPhotos:
    assert run.collection is not None
    sizes = class_sizes(run.collection)
    photos = Photo.objects.filter(collection=run.collection, category__in=sizes).order_by("serial")
    rows = list(photos.values_list("blob_id", "category_id"))
    frozen = FrozenPhotos.of(rows, {pk: path for pk, (path, _n) in sizes.items()})
    frozen.save(folder)
    return frozen


def _keep(lease: Lease, run: TrainingRun, item: Report) -> None:
    """One report of the engine, written down."""
    if isinstance(item, Started):
        plan = {
            **asdict(item.plan),
            "base_classes": list(item.base_classes),
            "validation_classes": list(item.validation_classes),
            "test_classes": list(item.test_classes),
            "chance": item.chance,
        }
        save_start(
            lease.claim, run, plan=plan, baseline=asdict(item.baseline), notes=item.notes, resumed_at=item.resumed_at
        )
    elif isinstance(item, Pretrained):
        words = {"epoch": item.epoch, "epochs": item.epochs, "accuracy": 100 * item.accuracy}
        message = _("Learning the base classes: epoch %(epoch)d of %(epochs)d, %(accuracy).0f %% right") % words
        report(lease.claim, "preparing", changes={"message": message}, done=item.epoch, total=item.epochs)
    elif isinstance(item, Step):
        event = asdict(item)
        episode = event.pop("episode")
        changes = {"done": episode, "message": _("%(rate).0f episodes/s") % {"rate": item.episodes_per_s}}
        save_metric(lease.claim, run, Metric.Kind.STEP, episode=episode, changes=changes, event=event)
    elif isinstance(item, Evaluated):
        score = asdict(item.score)
        event = {"epoch": item.epoch, "loss": item.loss, "best": item.best, **score}
        save_metric(lease.claim, run, Metric.Kind.EVALUATION, episode=item.episode, changes={}, event=event)
    elif isinstance(item, Saved):
        for old in save_checkpoint(lease.claim, run, item.path.name, episode=item.episode):
            (item.path.parent / old).unlink(missing_ok=True)
    else:
        _keep_finished(lease, run, item)


def _keep_finished(lease: Lease, run: TrainingRun, item: Finished) -> None:
    event: dict[str, Any] = {
        "best": asdict(item.best),
        "baseline": asdict(item.baseline),
        "test": asdict(item.test) if item.test else None,
        "test_baseline": asdict(item.test_baseline) if item.test_baseline else None,
        "recommends": item.recommends,
        "notes": list(item.notes),
    }
    save_model(lease.claim, run, folder=f"{run.folder}/{item.model.name}", card=event, event=event)
