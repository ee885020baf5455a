"""`evaluate` of the command line, and what it shares with `train`: the options of an episode, photos to embeddings."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.__main__ import ENCODERS, default_cache_dir
from fewshot_engine.config import DEFAULT_ENCODER, EpisodeConfig
from fewshot_engine.datasets import LabelledImages, check_episode, from_folder
from fewshot_engine.encoder import embed_files, load_encoder
from fewshot_engine.errors import DataError
from fewshot_engine.recipes import CARD, Recipe, load_recipe


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the engine's parser."""
    evaluate = subparsers.add_parser("evaluate", help="N-way K-shot accuracy of an encoder, with its 95 %% interval")
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    add_episode(evaluate, shot=1)
    evaluate.add_argument("--episodes", type=int, default=600)
    evaluate.add_argument("--encoder", default="fast", metavar="fast|NAME|CKPT", help=f"fast is {DEFAULT_ENCODER}")
    evaluate.add_argument(
        "--mode", choices=("inductive", "pool"), default="inductive", help="pool centres by the mean of DIR's photos"
    )
    add_common(evaluate)
    evaluate.set_defaults(run=_evaluate)


def add_episode(parser: argparse.ArgumentParser, *, shot: int) -> None:
    parser.add_argument("--way", type=int, default=5, metavar="N", help="classes an episode (5)")
    parser.add_argument("--shot", type=int, default=shot, metavar="K", help=f"support examples a class ({shot})")
    parser.add_argument("--query", type=int, default=15, metavar="Q", help="query images a class (15)")


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", default="leaf", help="which folders are the classes: leaf, top or 1, 2… (leaf)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where exported encoders are kept")
    parser.add_argument("--device", help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--json", action="store_true", help="accepted everywhere; the output is JSON in any case")


@dataclass(frozen=True, eq=False)
class Embedded:
    """The photos of a folder that could be read, with their embeddings; and why the others could not."""

    images: LabelledImages
    embeddings: NDArray[np.float32]
    refused: tuple[dict[str, str], ...]


def _evaluate(options: argparse.Namespace) -> None:
    from fewshot_engine.evaluation import evaluate, quality

    episode = EpisodeConfig(options.way, options.shot, options.query)
    found = from_folder(options.folder, options.level)
    plan = check_episode(found.counts(), episode)  # before the minutes that embedding takes
    embedded = embed_images(found, options.encoder, options)
    images, embeddings = embedded.images, embedded.embeddings
    plan = check_episode(images.counts(), episode)
    for note in plan.notes:
        say(note)
    if options.mode == "pool":
        embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
        embeddings = embeddings - embeddings.mean(axis=0)
    shape = {"way": plan.way, "shot": plan.shot, "query": plan.query}
    score = evaluate(
        embeddings, images.labels, **shape, episodes=options.episodes, seed=options.seed, groups=images.groups
    )
    distances = quality(embeddings, images.labels)
    print_json(
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


def embed_images(images: LabelledImages, encoder_name: str, options: argparse.Namespace) -> Embedded:
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
            say(f"{done.index + 1} of {len(images.paths)} photos embedded")
    if not rows:
        raise DataError(f"none of {len(images.paths)} files can be read as a photo; the first: {refused[0]['reason']}")
    embeddings = np.stack(rows)
    if recipe is not None:
        embeddings = recipe.apply(embeddings, familiarity=recipe.familiarity(embeddings))
    return Embedded(keep_rows(images, np.array(kept)), embeddings, tuple(refused))


def _encoder_and_recipe(name: str) -> tuple[str, Recipe | None]:
    card = Path(name) / CARD
    if card.is_file() and json.loads(card.read_text(encoding="utf-8")).get("kind") == "adapt":
        recipe = load_recipe(Path(name))
        return str(recipe.card["backbone"]), recipe
    return name, None


def keep_rows(images: LabelledImages, rows: NDArray[np.int64]) -> LabelledImages:
    groups = None if images.groups is None else images.groups[rows]
    return LabelledImages(images.classes, images.labels[rows], tuple(images.paths[row] for row in rows), groups)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
