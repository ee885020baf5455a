"""`train` of the command line: one JSON object on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fewshot_engine import cli
from fewshot_engine.config import (
    DEFAULT_ENCODER,
    TRAINABLE_BACKBONES,
    Augmentation,
    Curriculum,
    EpisodeConfig,
    Stage,
    TrainConfig,
    Variation,
)
from fewshot_engine.datasets import ClassSplit, LabelledImages, TrainData, from_folders
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.near_copies import group_near_copies
from fewshot_engine.pixel_cache import build_pixel_cache, read_pixel_cache
from fewshot_engine.recipes import CARD, WEIGHTS

if TYPE_CHECKING:
    from fewshot_engine.reports import Report

DESCRIPTION = """\
Meta-train a prototypical network on a folder of class folders.

adapt (the default) keeps the backbone frozen and learns a map of its embeddings, within a minute and without a GPU.
full learns the backbone itself from pixels.

Some classes are held out: validation classes choose the checkpoint, test classes give the final figure and nothing
else. Chance and the untrained backbone stand beside it.
"""

EPILOG = """\
examples:
  python -m fewshot_engine train photos --out model
  python -m fewshot_engine evaluate other-photos --encoder model
  python -m fewshot_engine train drawings --kind full --backbone conv4 --image-size 28 --no-flips --rotations \\
      --way 30 --shot 1 --epochs 10 --episodes 500 --out model
  python -m fewshot_engine train photos --kind full --backbone resnet12 --pretrain-epochs 20 --out model \\
      --curriculum 0:5:10,0.3:5:5,0.6:10:1
  python -m fewshot_engine train new-photos --kind full --backbone resnet12 --init-from model --out tuned \\
      --epochs 2 --lr 1e-4

the JSON on standard output:
  accuracy, ci95, way, shot, query, episodes, optimistic, chance   the figure to quote, and its 95 % interval
  measured_on          test; validation where there were too few classes for both; base where none were held out
  baseline             the same figure of the backbone before any training, on the same episodes
  validation, validation_baseline                                  what the checkpoint was chosen by
  recommends           trained, or frozen where training gained nothing
  notes, refused       sentences for people; files that are no photos, each with its reason
  model                the folder to give to --encoder
"""


def add_parsers(commands: cli.Commands) -> None:
    """Add the command to the engine's parser."""
    train = cli.add_command(
        commands,
        "train",
        _train,
        title="meta-train on a folder of class folders; classes are held out",
        explained=DESCRIPTION,
        epilog=EPILOG,
    )
    train.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of class folders, nested or not")
    train.add_argument("--val", type=Path, nargs="+", default=[], metavar="DIR", help="validation classes, not a share")
    train.add_argument("--test", type=Path, nargs="+", default=[], metavar="DIR", help="test classes; needs --val")
    train.add_argument("--kind", choices=("adapt", "full"), default="adapt", help="adapt keeps the backbone frozen")
    train.add_argument("--backbone", default=DEFAULT_ENCODER, help=f"full: {', '.join(TRAINABLE_BACKBONES)}")
    train.add_argument("--out", type=Path, required=True, metavar="CKPT", help="a folder; give it to --encoder later")
    train.add_argument("--resume", action="store_true", help="go on from the checkpoint in CKPT")
    train.add_argument("--init-from", type=Path, metavar="CKPT", help="full: start with a finished model's weights")
    cli.add_episode(train, shot=5)
    _add_course(train)
    _add_classes(train)
    _add_optimiser(train)
    _add_pixels(train)
    train.add_argument("--threads", type=int, help="of torch on the CPU")
    cli.add_level(train)
    cli.add_seed(train)
    cli.add_device(train)


def _add_course(train: argparse.ArgumentParser) -> None:
    course = train.add_argument_group("episodes")
    course.add_argument("--episodes", type=int, default=200, help="an epoch (200)")
    course.add_argument("--epochs", type=int, help="5; 2 for adapt")
    course.add_argument("--episodes-per-step", type=int, default=1, help="averaged by each step of the optimiser (1)")
    course.add_argument("--eval-episodes", type=int, default=600, help="of each evaluation (600)")
    course.add_argument(
        "--eval-every", type=int, default=1, metavar="EPOCHS", help="from one evaluation to the next (1)"
    )
    course.add_argument("--eval-every-episodes", type=int, default=0, metavar="N", help="instead, counted in episodes")
    course.add_argument(
        "--patience", type=int, default=0, metavar="N", help="stop after N evaluations without a better"
    )
    course.add_argument(
        "--curriculum",
        type=_curriculum,
        metavar="SINCE:WAY:SHOT,…",
        help="easy to hard: stages, each from a share of the episodes on, such as 0:5:10,0.3:5:5,0.6:10:1",
    )
    course.add_argument("--vary-ways", type=_range, metavar="A-B", help="draw the ways of each step from a range")
    course.add_argument("--vary-shots", type=_range, metavar="A-B", help="and the shots")


def _add_classes(train: argparse.ArgumentParser) -> None:
    classes = train.add_argument_group("classes")
    classes.add_argument("--validation-share", type=float, default=0.2, help="of the classes (0.2); 0 holds none out")
    classes.add_argument("--test-share", type=float, default=0.1, help="of the classes, where there are enough (0.1)")
    classes.add_argument(
        "--class-weights",
        choices=("balanced", "size"),
        default="balanced",
        help="draw classes alike, or in proportion to their photos",
    )
    classes.add_argument(
        "--rotations", action="store_true", help="full: each base class turned by 90, 180, 270 degrees is one more"
    )
    classes.add_argument(
        "--near-copies",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="look for near copies by comparing pixels, and keep them on one side of splits and episodes (on)",
    )


def _add_optimiser(train: argparse.ArgumentParser) -> None:
    optimiser = train.add_argument_group("optimiser")
    optimiser.add_argument("--optimiser", choices=("adamw", "sgd"), default="adamw")
    optimiser.add_argument("--lr", type=float, help="learning rate: 1e-3; 1e-4 for adapt")
    optimiser.add_argument(
        "--schedule", choices=("constant", "cosine", "step", "plateau"), default="cosine", help="of the rate (cosine)"
    )
    optimiser.add_argument("--warmup", type=int, default=0, metavar="EPISODES", help="in which the rate rises from 0")
    optimiser.add_argument("--weight-decay", type=float, help="5e-4; 0 for adapt")
    optimiser.add_argument("--label-smoothing", type=float, default=0.0, help="0 to below 1 (0)")
    optimiser.add_argument(
        "--clip", type=float, default=0.0, metavar="NORM", help="shorten the gradient to this length"
    )
    optimiser.add_argument("--ema", type=float, default=0.0, metavar="DECAY", help="average the weights, such as 0.999")


def _add_pixels(train: argparse.ArgumentParser) -> None:
    typical = Augmentation()
    pixels = train.add_argument_group("pixels (full alone)")
    pixels.add_argument("--image-size", type=int, default=84, help="pixels (84)")
    pixels.add_argument(
        "--no-flips", action="store_true", help="for letters and all that a mirror turns into another thing"
    )
    pixels.add_argument("--rotation", type=float, default=typical.rotation, help="up to, in degrees (%(default)g)")
    pixels.add_argument("--crop", type=float, default=typical.crop, help="scale and move by up to (%(default)g)")
    pixels.add_argument("--colour", type=float, default=typical.colour, help="jitter by up to (%(default)g)")
    pixels.add_argument("--float32", action="store_true", help="no bfloat16 on a GPU")
    pixels.add_argument(
        "--pretrain-epochs", type=int, default=0, help="learn the base classes as such first; deep nets gain from it"
    )
    pixels.add_argument("--pretrain-lr", type=float, help="its learning rate; --lr where not given")


def _config(options: argparse.Namespace) -> TrainConfig:
    vary = None
    if options.vary_ways or options.vary_shots:
        ways = options.vary_ways or (options.way, options.way)
        vary = Variation(ways, options.vary_shots or (options.shot, options.shot))
    # What the command line leaves to the kind is left out, so that the configuration fills it in.
    typical = {
        "epochs": options.epochs,
        "learning_rate": options.lr,
        "weight_decay": options.weight_decay,
        "pretrain_learning_rate": options.pretrain_lr,
    }
    return TrainConfig(
        kind=options.kind,
        backbone=options.backbone,
        episode=EpisodeConfig(options.way, options.shot, options.query),
        episodes_per_epoch=options.episodes,
        episodes_per_step=options.episodes_per_step,
        image_size=options.image_size,
        eval_every=options.eval_every,
        eval_every_episodes=options.eval_every_episodes,
        eval_episodes=options.eval_episodes,
        seed=options.seed,
        validation_share=options.validation_share,
        test_share=options.test_share,
        class_weights=options.class_weights,
        curriculum=options.curriculum,
        vary=vary,
        rotations_as_classes=options.rotations,
        optimiser=options.optimiser,
        schedule=options.schedule,
        warmup_episodes=options.warmup,
        label_smoothing=options.label_smoothing,
        clip_norm=options.clip,
        ema_decay=options.ema,
        augmentation=Augmentation(not options.no_flips, options.rotation, options.crop, options.colour),
        mixed_precision=not options.float32,
        pretrain_epochs=options.pretrain_epochs,
        patience=options.patience,
        **{name: value for name, value in typical.items() if value is not None},
    )


def _curriculum(text: str) -> Curriculum:
    try:
        stages = [part.split(":") for part in text.split(",")]
        return Curriculum(tuple(Stage(float(since), int(way), int(shot)) for since, way, shot in stages))
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no curriculum: write stages such as 0:5:10,0.5:5:1") from error


def _range(text: str) -> tuple[int, int]:
    low, dash, high = text.partition("-")
    if not (dash and low.isdigit() and high.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is no range: write it such as 3-10")
    return int(low), int(high)


def _train(options: argparse.Namespace) -> None:
    from fewshot_engine.reports import Finished
    from fewshot_engine.training import meta_train  # torch: not for `--help`

    config = _config(options)
    images = from_folders([*options.folders, *options.val, *options.test], options.level)
    if options.near_copies:
        alone = sum(images.counts().values())
        images = group_near_copies(images, decode_workers=os.cpu_count() or 1)
        cli.say(f"{alone - sum(images.counts().values())} near copies stay beside the photo that they copy")
    split = _given_split(images, options, config.episode) if options.val else None
    data, refused = _train_data(config, images, split, options)
    checkpoint = options.out / "run.safetensors"
    resume = checkpoint if options.resume and checkpoint.exists() else None
    for report in meta_train(
        config,
        data,
        checkpoint=checkpoint,
        resume=resume,
        init_from=options.init_from,
        device=options.device,
        threads=options.threads,
    ):
        _say_progress(report)
        if isinstance(report, Finished):
            _keep(report.model, options.out)
            held_out = "base" if report.baseline.optimistic else "validation"
            cli.print_json(
                {
                    **asdict(report.final),
                    "chance": 1 / report.final.way,
                    "measured_on": "test" if report.test else held_out,
                    "baseline": asdict(report.test_baseline or report.baseline),
                    "validation": asdict(report.best),
                    "validation_baseline": asdict(report.baseline),
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
        encoder, recipe = cli.load_encoder(config.backbone, options)
        if recipe is not None:
            raise ConfigError(f"{config.backbone} is adapted already: adapt the encoder that it began with")
        embedded = cli.embed_images(images, encoder)
        kept = embedded.images
        data = TrainData(kept.classes, kept.labels, kept.groups, embeddings=embedded.embeddings, split=split)
        return data, embedded.refused
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / "pixels.npy"
    workers = os.cpu_count() or 1
    for done in build_pixel_cache(images.paths, config.image_size, cache, decode_workers=workers):
        cli.say(f"{done} of {len(images.paths)} photos decoded")
    pixels = read_pixel_cache(cache, images.paths, config.image_size)
    rows = np.flatnonzero(pixels.readable)
    kept = cli.keep_rows(images, rows)
    source = pixels.pixels if pixels.readable.all() else lambda indices: pixels.pixels[rows[indices]]
    refused = [{"path": path, "reason": reason} for path, reason in pixels.refused]
    return TrainData(kept.classes, kept.labels, kept.groups, pixels=source, split=split), refused


def _given_split(images: LabelledImages, options: argparse.Namespace, episode: EpisodeConfig) -> ClassSplit:
    """Base from DIR…, validation from --val, test from --test; the paths say which is which."""
    validation, test = (_classes_under(images, folders) for folders in (options.val, options.test))
    for name, held, given in (("--val", validation, True), ("--test", test, bool(options.test))):
        if given and len(held) < 2:
            raise DataError(f"{name} holds {len(held)} classes: it needs 2")
    base = set(range(len(images.classes))) - set(validation) - set(test)
    return ClassSplit(tuple(sorted(base)), validation, min(episode.way, len(validation)), test=test)


def _classes_under(images: LabelledImages, folders: Sequence[Path]) -> tuple[int, ...]:
    roots = tuple(str(folder) + os.sep for folder in folders)
    under = {int(label) for label, path in zip(images.labels, images.paths, strict=True) if path.startswith(roots)}
    return tuple(sorted(under))


def _keep(model: Path, out: Path) -> None:
    """The finished model goes to CKPT itself; what only the run needed goes away."""
    for name in (WEIGHTS, CARD):
        (model / name).replace(out / name)
    model.rmdir()
    for leftover in out.glob("pixels.npy*"):
        leftover.unlink()


def _say_progress(report: Report) -> None:
    from fewshot_engine.reports import Evaluated, Pretrained, Started, Step

    if isinstance(report, Started):
        parts = (report.base_classes, report.validation_classes, report.test_classes)
        base, held, test = map(len, parts)
        cli.say(f"{base} base, {held} validation and {test} test classes; chance {report.chance:.1%}")
        cli.say(f"untrained: {report.baseline.accuracy:.1%} ± {report.baseline.ci95:.1%}")
        for note in report.notes:
            cli.say(note)
    elif isinstance(report, Pretrained):
        cli.say(
            f"base classes, epoch {report.epoch} of {report.epochs}: loss {report.loss:.3f}, accuracy "
            f"{report.accuracy:.1%}, {report.photos_per_s:.0f} photos/s, {report.seconds_left:.0f} s left"
        )
    elif isinstance(report, Step):
        cli.say(
            f"epoch {report.epoch}, episode {report.episode}: loss {report.loss:.3f}, accuracy {report.accuracy:.1%}, "
            f"{report.episodes_per_s:.1f} episodes/s, {report.seconds_left:.0f} s left"
        )
    elif isinstance(report, Evaluated):
        best = ", the best so far" if report.best else ""
        cli.say(f"validation: {report.score.accuracy:.1%} ± {report.score.ci95:.1%}{best}")
