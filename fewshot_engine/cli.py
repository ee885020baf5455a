"""What the commands have in common: flags, photos to embeddings, answers as lines.

Results are JSON on standard output; progress and complaints are sentences on standard error.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.datasets import PHOTO_SUFFIXES, LabelledImages
from fewshot_engine.encoder import Encoder, embed_files, load_with_recipe
from fewshot_engine.errors import DataError
from fewshot_engine.framing import VIEWS
from fewshot_engine.inference import Predictions, verdict
from fewshot_engine.recipes import Recipe
from fewshot_engine.text import TextPredictions
from fewshot_engine.weights import default_cache_dir

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Answers: TypeAlias = Predictions | TextPredictions
Float32Array = NDArray[np.float32]

ENCODER_HELP = """\
Encoders: accurate (EfficientNet-Lite0, -Lite1 and -Lite2 side by side), fast (Lite0 alone: a third of the work, 2 to 4
points less at 1 shot), the name of a backbone (`weights --list` shows them), or a folder that `train` wrote. The first
use of one exports it to ONNX, which takes some seconds and is kept in --cache-dir. A model of the kind adapt says how
familiar the photos are, from 0 to 100 %: the less they resemble what it was adapted to, the more its frozen encoder
answers.
"""


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], None],
    *,
    title: str,
    explained: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=title, description=explained, epilog=epilog, formatter_class=as_written)
    parser.set_defaults(run=run)
    return parser


def add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", default="leaf", help="which folders are the classes: leaf, top or 1, 2… (leaf)")


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0)


def add_episode(parser: argparse.ArgumentParser, *, shot: int) -> None:
    parser.add_argument("--way", type=int, default=5, metavar="N", help="classes an episode (5)")
    parser.add_argument("--shot", type=int, default=shot, metavar="K", help=f"support examples a class ({shot})")
    parser.add_argument("--query", type=int, default=15, metavar="Q", help="query images a class (15)")


def add_top_k(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--top-k", type=positive, default=3, metavar="K", help="labels to list for each photo (3)")


def add_encoder(parser: argparse.ArgumentParser, *, usual: str = "accurate") -> None:
    parser.epilog = ENCODER_HELP
    parser.add_argument("--encoder", default=usual, metavar="accurate|fast|NAME|CKPT", help=f"see below ({usual})")
    parser.add_argument(
        "--views",
        type=lambda text: tuple(text.split(",")),
        default=("whole",),
        metavar="VIEW,…",
        help=f"what of each photo is looked at and averaged: {', '.join(VIEWS)}; crop:0.65 says how tight (whole)",
    )
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu or cuda; a GPU is taken where there is one")
    add_cache(parser)


def add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where exported encoders are kept")
    add_json(parser)


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="accepted everywhere; the output is JSON in any case")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def photos_under(folder: Path) -> LabelledImages:
    """Every photo in any depth, all of one class."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    if not paths:
        raise DataError(f"{folder} holds no photos")
    return LabelledImages(("",), np.zeros(len(paths), dtype=np.int64), tuple(map(str, paths)))


@dataclass(frozen=True, eq=False)
class Embedded:
    """The photos that could be read, with their embeddings; and why the others could not."""

    images: LabelledImages
    embeddings: Float32Array
    refused: tuple[dict[str, str], ...]

    def check_examples(self) -> None:
        """Name the labels that lost all of their examples."""
        lost = [name for label, name in enumerate(self.images.classes) if label not in self.images.labels]
        if lost:
            raise DataError(f"no example of {', '.join(lost)} can be read: replace its photos, or take the folder away")


def load_encoder(
    name: str, options: argparse.Namespace, *, views: tuple[str, ...] = ("whole",)
) -> tuple[Encoder, Recipe | None]:
    """A built-in encoder, a trained backbone, or the encoder under an adapted model's recipe."""
    # One thread for each forward pass, and a worker for each core: see `embed_files`.
    return load_with_recipe(name, cache_dir=options.cache_dir, threads=1, device=options.device, views=views)


def embed_images(images: LabelledImages, encoder: Encoder, *, none_will_do: bool = False) -> Embedded:
    """With progress and refusals on standard error; that no file is a photo is an error unless none will do."""
    rows, kept, refused = [], [], []
    total, started = len(images.paths), time.monotonic()
    told = started
    for count, done in enumerate(embed_files(map(Path, images.paths), encoder, workers=os.cpu_count() or 1), start=1):
        if done.embedding is None:
            refused.append({"path": str(done.path), "reason": done.refused or ""})
            say(f"refused {done.path}: {done.refused}")
        else:
            rows.append(done.embedding)
            kept.append(done.index)
        now = time.monotonic()
        if now - told >= 1 or count == total:
            told = now
            say(f"{count} of {total} photos, {count / max(now - started, 1e-9):.0f}/s")
    if not rows and not none_will_do:
        raise DataError(f"none of {total} files can be read as a photo; the first: {refused[0]['reason']}")
    embeddings = np.stack(rows) if rows else np.empty((0, encoder.dim), dtype=np.float32)
    return Embedded(keep_rows(images, np.array(kept, dtype=np.int64)), embeddings, tuple(refused))


def keep_rows(images: LabelledImages, rows: NDArray[np.int64]) -> LabelledImages:
    groups = None if images.groups is None else images.groups[rows]
    return LabelledImages(images.classes, images.labels[rows], tuple(images.paths[row] for row in rows), groups)


def as_adapted(
    recipe: Recipe | None, photos: Float32Array, *others: Float32Array
) -> tuple[float | None, tuple[Float32Array, ...]]:
    """How familiar an adapted model is with photos, which is said, and what it makes of them and of others by that.

    Without a recipe, or without photos, None and the embeddings as they are.
    """
    if recipe is None or not len(photos):
        return None, (photos, *others)
    familiarity = recipe.familiarity(photos)
    adapted = recipe.share * familiarity
    where = "near" if familiarity > 0.75 else "far from" if familiarity < 0.25 else "some way from"
    say(
        f"{familiarity:.0%} familiar: the photos are {where} what the model was adapted to. Its adapted part has "
        f"{adapted:.0%} of the say in answers, the encoder that it began with {1 - adapted:.0%}."
    )
    return familiarity, tuple(recipe.apply(rows, familiarity=familiarity) for rows in (photos, *others))


def likeness(
    encoder: Encoder, recipe: Recipe | None, photos: Float32Array, familiarity: float | None
) -> Float32Array | None:
    """What the classes that photos resemble look like, beside what `as_adapted` makes of them; None if none is known.

    Args:
        photos: (n, dim), the encoder's own embeddings.
        familiarity: what `as_adapted` said.
    """
    found = encoder.likeness(photos)
    if found is None or recipe is None or familiarity is None:
        return found
    return recipe.beside(found, familiarity=familiarity)


def print_answers(
    answers: Answers, photos: Embedded, labels: Sequence[str], *, top_k: int, reject: bool = False
) -> None:
    """A line for each photo that was answered, then one for each file that was refused."""
    for row, path in enumerate(photos.images.paths):
        print_json({"path": path, **_answer(answers, row, labels, top_k, reject=reject)})
    for refusal in photos.refused:
        print_json({**refusal, "label": None, "verdict": "refused"})


def _answer(answers: Answers, row: int, labels: Sequence[str], top_k: int, *, reject: bool) -> dict[str, Any]:
    stranger = float(answers.stranger[row])
    said = verdict(float(answers.confidences[row, 0]), stranger)
    top = zip(answers.labels[row, :top_k], answers.confidences[row], answers.distances[row], strict=False)
    ranked: list[dict[str, Any]] = [
        {"label": labels[label], "confidence": round(float(share), 4), "distance": round(float(distance), 4)}
        for label, share, distance in top
    ]
    best = ranked[0] | ({"label": None} if reject and said == "none" else {})
    return {**best, "stranger": round(stranger, 4), "top_k": ranked, "verdict": said}


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
