"""`train` and `evaluate` of the command line: one JSON object on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.__main__ import ENCODERS, default_cache_dir
from fewshot_engine.config import DEFAULT_ENCODER, TRAINABLE_BACKBONES, EpisodeConfig, TrainConfig
from fewshot_engine.datasets import (
    ClassSplit,
    LabelledImages,
    build_pixel_cache,
    check_episode,
    from_folder,
    from_folders,
    read_pixel_cache,
)
from fewshot_engine.encoder import embed_files, load_encoder
from fewshot_engine.errors import DataError
from fewshot_engine.recipes import CARD, WEIGHTS, Recipe, load_recipe

if TYPE_CHECKING:
    from fewshot_engine.training import Report, TrainData

LEARNING_RATES = {"adapt": 1e-4, "full": 1e-3}


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the two commands to the engine's parser."""
    train = subparsers.add_parser("train", help="meta-train on a folder of class folders; classes are held out")
    train.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folders of class folders, nested or not")
    train.add_argument(
        "--val", type=Path, nargs="+", default=[], metavar="DIR", help="validation classes, instead of a share"
    )
    train.add_argument("--kind", choices=("adapt", "full"), default="adapt", help="adapt keeps the backbone frozen")
    train.add_argument("--backbone", default=DEFAULT_ENCODER, help=f"full: {' or '.join(TRAINABLE_BACKBONES)}")
    _add_episode(train, shot=5)
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
    _add_common(train)
    train.set_defaults(run=_train)

    evaluate = subparsers.add_parser("evaluate", help="N-way K-shot accuracy of an encoder, with its 95 %% interval")
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    _add_episode(evaluate, shot=1)
    evaluate.add_argument("--episodes", type=int, default=600)
    evaluate.add_argument("--encoder", default="fast", metavar="fast|NAME|CKPT", help=f"fast is {DEFAULT_ENCODER}")
    evaluate.add_argument(
        "--mode", choices=("inductive", "pool"), default="inductive", help="pool centres by the mean of DIR's photos"
    )
    _add_common(evaluate)
    evaluate.set_defaults(run=_evaluate)


def _add_episode(parser: argparse.ArgumentParser, *, shot: int) -> None:
    parser.add_argument("--way", type=int, default=5, metavar="N", help="classes an episode (5)")
    parser.add_argument("--shot", type=int, default=shot, metavar="K", help=f"support examples a class ({shot})")
    parser.add_argument("--query", type=int, default=15, metavar="Q", help="query images a class (15)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", default="leaf", help="which folders are the classes: leaf, top or 1, 2… (leaf)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where exported encoders are kept")
    parser.add_argument("--device", help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", action="store_true", help="accepted everywhere; the output is JSON in any case")


@dataclass(frozen=True, eq=False)
class _Embedded:
    """The photos of a folder that could be read, with their embeddings; and why the others could not."""

    images: LabelledImages
    embeddings: NDArray[np.float32]
    refused: tuple[dict[str, str], ...]


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
        flips=not options.no_flips,
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
            _print(
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


def _evaluate(options: argparse.Namespace) -> None:
    from fewshot_engine.evaluation import evaluate, quality

    episode = EpisodeConfig(options.way, options.shot, options.query)
    found = from_folder(options.folder, options.level)
    plan = check_episode(found.counts(), episode)  # before the minutes that embedding takes
    embedded = _embed(found, options.encoder, options)
    images, embeddings = embedded.images, embedded.embeddings
    plan = check_episode(images.counts(), episode)
    for note in plan.notes:
        _say(note)
    if options.mode == "pool":
        embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        embeddings = embeddings - embeddings.mean(axis=0)
    shape = {"way": plan.way, "shot": plan.shot, "query": plan.query}
    score = evaluate(
        embeddings, images.labels, **shape, episodes=options.episodes, seed=options.seed, groups=images.groups
    )
    distances = quality(embeddings, images.labels)
    _print(
        {
            **asdict(score),
            "chance": plan.chance,
            "encoder": options.encoder,
            "mode": options.mode,
            **asdict(distances),
            "left_out": [list(pair) for pair in plan.left_out],
            "notes": plan.notes,
            "refused": embedded.refused,
        }
    )


def _train_data(
    config: TrainConfig, images: LabelledImages, split: ClassSplit | None, options: argparse.Namespace
) -> tuple[TrainData, Sequence[dict[str, str]]]:
    from fewshot_engine.training import TrainData

    if config.kind == "adapt":
        embedded = _embed(images, config.backbone, options)
        kept = embedded.images
        data = TrainData(kept.classes, kept.labels, kept.groups, embeddings=embedded.embeddings, split=split)
        return data, embedded.refused
    options.out.mkdir(parents=True, exist_ok=True)
    cache = options.out / "pixels.npy"
    workers = os.cpu_count() or 1
    for done in build_pixel_cache(images.paths, config.image_size, cache, decode_workers=workers):
        _say(f"{done} of {len(images.paths)} photos decoded")
    pixels = read_pixel_cache(cache, images.paths, config.image_size)
    rows = np.flatnonzero(pixels.readable)
    kept = _only(images, rows)
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


def _embed(images: LabelledImages, encoder_name: str, options: argparse.Namespace) -> _Embedded:
    """With a built-in encoder, a trained backbone, or a recipe over the embeddings of one."""
    name, recipe = _encoder_and_recipe(ENCODERS.get(encoder_name, encoder_name))
    # One thread for each forward pass, and a worker for each core: see `embed_files`.
    encoder = load_encoder(name, cache_dir=options.cache_dir, threads=1, device=options.device)
    rows, kept, refused = [], [], []
    for done in embed_files(map(Path, images.paths), encoder, workers=os.cpu_count() or 1):
        if done.embedding is None:
            refused.append({"path": str(done.path), "reason": done.refused or ""})
        else:
            rows.append(done.embedding)
            kept.append(done.index)
        if (done.index + 1) % 200 == 0:
            _say(f"{done.index + 1} of {len(images.paths)} photos embedded")
    if not rows:
        raise DataError(f"none of {len(images.paths)} files can be read as a photo; the first: {refused[0]['reason']}")
    embeddings = np.stack(rows)
    return _Embedded(_only(images, np.array(kept)), recipe.apply(embeddings) if recipe else embeddings, tuple(refused))


def _encoder_and_recipe(name: str) -> tuple[str, Recipe | None]:
    card = Path(name) / CARD
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("kind") == "adapt":
        recipe = load_recipe(Path(name))
        return str(recipe.card["backbone"]), recipe
    return name, None


def _only(images: LabelledImages, rows: NDArray[np.int64]) -> LabelledImages:
    groups = None if images.groups is None else images.groups[rows]
    return LabelledImages(images.classes, images.labels[rows], tuple(images.paths[row] for row in rows), groups)


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
        _say(f"{base} base and {held} validation classes; chance {report.chance:.1%}")
        _say(f"untrained: {report.baseline.accuracy:.1%} ± {report.baseline.ci95:.1%}")
        for note in report.notes:
            _say(note)
    elif isinstance(report, Step):
        _say(
            f"epoch {report.epoch}, episode {report.episode}: loss {report.loss:.3f}, accuracy {report.accuracy:.1%}, "
            f"{report.episodes_per_s:.1f} episodes/s, {report.seconds_left:.0f} s left"
        )
    elif isinstance(report, Evaluated):
        best = ", the best so far" if report.best else ""
        _say(f"validation: {report.score.accuracy:.1%} ± {report.score.ci95:.1%}{best}")


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
