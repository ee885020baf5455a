"""`train` of the command line: one JSON object on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewshot_engine.cli_evaluate import add_common, add_episode, embed_images, keep_rows, print_json, say
from fewshot_engine.config import DEFAULT_ENCODER, TRAINABLE_BACKBONES, Augmentation, EpisodeConfig, TrainConfig
from fewshot_engine.datasets import (
    ClassSplit,
    LabelledImages,
    TrainData,
    build_pixel_cache,
    from_folders,
    read_pixel_cache,
)
from fewshot_engine.errors import DataError
from fewshot_engine.recipes import CARD, WEIGHTS

if TYPE_CHECKING:
    from fewshot_engine.training import Report

LEARNING_RATES = {"adapt": 1e-4, "full": 1e-3}


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the engine's parser."""
    train = subparsers.add_parser("train", help="meta-train on a folder of class folders; classes are held out")
    train.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of class folders, nested or not")
    train.add_argument(
        "--val", type=Path, nargs="+", default=[], metavar="DIR", help="validation classes, instead of a share"
    )
    train.add_argument("--kind", choices=("adapt", "full"), default="adapt", help="adapt keeps the backbone frozen")
    train.add_argument("--backbone", default=DEFAULT_ENCODER, help=f"full: {' or '.join(TRAINABLE_BACKBONES)}")
    add_episode(train, shot=5)
    train.add_argument("--episodes", type=int, default=200, help="an epoch (200)")
    train.add_argument("--epochs", type=int, default=5)
    train.add_argument("--episodes-per-step", type=int, default=1, help="averaged by each step of the optimiser (1)")
    train.add_argument("--image-size", type=int, default=84, help="pixels; full alone (84)")
    train.add_argument("--lr", type=float, help="learning rate: 1e-4 for adapt, 1e-3 for full")
    train.add_argument("--eval-episodes", type=int, default=600)
    train.add_argument(
        "--no-flips", action="store_true", help="for letters and all that a mirror turns into another thing"
    )
    train.add_argument("--out", type=Path, required=True, metavar="CKPT", help="a folder; give it to --encoder later")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in CKPT")
    add_common(train)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> None:
    from fewshot_engine.training import Finished, meta_train  # torch: not for `--help`

    config = TrainConfig(
        kind=options.kind,
        backbone=options.backbone,
        episode=EpisodeConfig(options.way, options.shot, options.query),
        epochs=options.epochs,
        episodes_per_epoch=options.episodes,
        episodes_per_step=options.episodes_per_step,
        image_size=options.image_size,
        learning_rate=options.lr or LEARNING_RATES[options.kind],
        eval_episodes=options.eval_episodes,
        seed=options.seed,
        augmentation=Augmentation(flips=not options.no_flips),
    )
    images = from_folders([*options.folders, *options.val], options.level)
    split = _given_split(images, options, config.episode) if options.val else None
    data, refused = _train_data(config, images, split, options)
    checkpoint = options.out / "run.safetensors"
    resume = checkpoint if options.resume and checkpoint.exists() else None
    for report in meta_train(
        config, data, checkpoint=checkpoint, resume=resume, device=options.device, threads=options.threads
    ):
        _say_progress(report)
        if isinstance(report, Finished):
            _keep(report.model, options.out)
            print_json(
                {
                    **asdict(report.best),
                    "chance": 1 / report.best.way,
                    "baseline": asdict(report.baseline),
                    "recommends": report.recommends,
                    "notes": report.notes,
                    "refused": refused,
                    "model": str(options.out),
                }
            )


def _train_data(
    config: TrainConfig, images: LabelledImages, split: ClassSplit | None, options: argparse.Namespace
) -> tuple[TrainData, Sequence[dict[str, str]]]:
    if config.kind == "adapt":
        embedded = embed_images(images, config.backbone, options)
        kept = embedded.images
        data = TrainData(kept.classes, kept.labels, kept.groups, embeddings=embedded.embeddings, split=split)
        return data, embedded.refused
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / "pixels.npy"
    workers = os.cpu_count() or 1
    for done in build_pixel_cache(images.paths, config.image_size, cache, decode_workers=workers):
        say(f"{done} of {len(images.paths)} photos decoded")
    pixels = read_pixel_cache(cache, images.paths, config.image_size)
    rows = np.flatnonzero(pixels.readable)
    kept = keep_rows(images, rows)
    source = pixels.pixels if pixels.readable.all() else lambda indices: pixels.pixels[rows[indices]]
    refused = [{"path": path, "reason": reason} for path, reason in pixels.refused]
    return TrainData(kept.classes, kept.labels, kept.groups, pixels=source, split=split), refused


def _given_split(images: LabelledImages, options: argparse.Namespace, episode: EpisodeConfig) -> ClassSplit:
    """Base from DIR…, validation from --val; the paths say which is which."""
    roots = [str(root) + os.sep for root in options.val]
    held = {
        int(label) for label, path in zip(images.labels, images.paths, strict=True) if path.startswith(tuple(roots))
    }
    base = tuple(sorted(set(range(len(images.classes))) - held))
    if len(held) < 2:
        raise DataError(f"--val holds {len(held)} classes: validation needs 2")
    return ClassSplit(base, tuple(sorted(held)), min(episode.way, len(held)))


def _keep(model: Path, out: Path) -> None:
    """The finished model goes to CKPT itself; what only the run needed goes away."""
    for name in (WEIGHTS, CARD):
        (model / name).replace(out / name)
    model.rmdir()
    for leftover in out.glob("pixels.npy*"):
        leftover.unlink()


def _say_progress(report: Report) -> None:
    from fewshot_engine.training import Evaluated, Started, Step

    if isinstance(report, Started):
        base, held = len(report.base_classes), len(report.validation_classes)
        say(f"{base} base and {held} validation classes; chance {report.chance:.1%}")
        say(f"untrained: {report.baseline.accuracy:.1%} ± {report.baseline.ci95:.1%}")
        for note in report.notes:
            say(note)
    elif isinstance(report, Step):
        say(
            f"epoch {report.epoch}, episode {report.episode}: loss {report.loss:.3f}, accuracy {report.accuracy:.1%}, "
            f"{report.episodes_per_s:.1f} episodes/s, {report.seconds_left:.0f} s left"
        )
    elif isinstance(report, Evaluated):
        best = ", the best so far" if report.best else ""
        say(f"validation: {report.score.accuracy:.1%} ± {report.score.ci95:.1%}{best}")
