"""`evaluate` of the command line, and what it shares with `train`: the options of an episode, photos to embeddings."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewshot_engine.config import EpisodeConfig
from fewshot_engine.datasets import EpisodePlan, LabelledImages, check_episode, from_folder
from fewshot_engine.encoder import embed_files, load_with_recipe
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.framing import VIEWS
from fewshot_engine.prototypes import Rule
from fewshot_engine.weights import default_cache_dir

if TYPE_CHECKING:
    from fewshot_engine.evaluation import Protocol, Report

EXPLAINED = """\
Draws episodes from DIR, a folder of class folders: N classes (--way), K examples of each (--shot), Q photos of each to
recognise (--query). The answers are those that `classify` would give. Where a class has fewer than K + Q photos, Q
shrinks for all; one with fewer than K + 1 is named and left out.

  python -m fewshot_engine evaluate photos/ --way 5 --shot 1
  python -m fewshot_engine evaluate photos/ --shot 5 --mode batch --imbalance 2
  python -m fewshot_engine evaluate photos/ --grid 5,10,20x1,5

prints one object:
  accuracy, ci95         the mean over the episodes, and half the width of its 95 % interval
  chance, class_means    what guessing gives, and the plain nearest class mean by cosine, on the same episodes
  inductive, changed     in the other modes: accuracy without what the mode adds; in batch, the share of other answers
  frozen                 for a model of the kind adapt: accuracy of the encoder that it began with
  calibration_error      how far confidences are from hit rates; 0.02 is good
  stranger_auroc         how well photos of N classes without examples are told from the others; 0.5 is guessing
  intra_class, inter_class, ratio   cosine distances within and between classes; the smaller the ratio, the better
  per_class, confusions  accuracy of each class, and what the ten worst mistakes are

Modes: inductive looks at the examples alone; pool also at DIR's photos, without their labels (their mean, and what lies
near each example); batch also at the other photos that are to be recognised. Real batches are not balanced: with
--imbalance 2 the classes have Dirichlet shares of N x Q photos, as in Veilleux et al. 2021, and figures are lower and
more honest.
"""
ENCODERS_EXPLAINED = """\
Encoders: accurate (several backbones side by side, the default), fast (one of them), the name of a backbone, or a
folder that `train` wrote.
"""


def add_parsers(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the engine's parser."""
    evaluate = subparsers.add_parser(
        "evaluate",
        help="N-way K-shot accuracy of an encoder, with its 95 %% interval",
        description=EXPLAINED,
        epilog=ENCODERS_EXPLAINED,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    add_episode(evaluate, shot=1)
    evaluate.add_argument("--episodes", type=int, default=600, help="how many; an interval to quote takes 600 (600)")
    evaluate.add_argument("--encoder", default="accurate", metavar="accurate|fast|NAME|CKPT", help="see below")
    evaluate.add_argument(
        "--views",
        type=lambda text: tuple(text.split(",")),
        default=("whole",),
        metavar="VIEW,…",
        help=f"what of each photo is looked at and averaged: {', '.join(VIEWS)} (whole)",
    )
    evaluate.add_argument(
        "--mode", choices=("inductive", "pool", "batch"), default="inductive", help="what else is looked at (inductive)"
    )
    evaluate.add_argument(
        "--method",
        default="ridge",
        help="of batch: ridge, soft-k-means, soft-k-means-shares, bd-cspn, alpha-tim (ridge)",
    )
    evaluate.add_argument(
        "--imbalance", type=float, metavar="ALPHA", help="Dirichlet shares instead of Q photos a class; 2 is usual"
    )
    evaluate.add_argument(
        "--grid", type=_grid, metavar="WAYSxSHOTS", help="accuracy at every N and K, such as 5,10,20x1,5,10"
    )
    evaluate.add_argument(
        "--advise", action="store_true", help="also say which classifier suits DIR as a label set, and why"
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
    """The photos of a folder that could be read, with their embeddings; and why the others could not.

    `rule` is by which labels answer on them; `frozen` are the embeddings before the map of an *adapt* model, if any.
    """

    images: LabelledImages
    embeddings: NDArray[np.float32]
    refused: tuple[dict[str, str], ...]
    rule: Rule
    frozen: NDArray[np.float32] | None = None


def _evaluate(options: argparse.Namespace) -> None:
    episode = EpisodeConfig(options.way, options.shot, options.query)
    if options.grid and (options.mode != "inductive" or options.imbalance is not None):
        raise ConfigError("--grid is inductive and balanced: take --mode and --imbalance away, or the grid")
    found = from_folder(options.folder, options.level)
    _protocol(
        check_episode(found.counts(), episode), Rule(), options
    )  # mistakes come before the minutes that embedding takes
    embedded = embed_images(found, options.encoder, options, views=options.views)
    images, embeddings = embedded.images, embedded.embeddings
    plan = check_episode(images.counts(), episode)
    for note in plan.notes:
        say(note)
    protocol = _protocol(plan, embedded.rule, options)
    result = {
        **_report(embeddings, images, protocol).to_dict(images.classes),
        "encoder": options.encoder,
        "views": list(options.views),
        "left_out": [list(pair) for pair in plan.left_out],
        "notes": plan.notes,
        "refused": embedded.refused,
    }
    if embedded.frozen is not None:
        result["frozen"] = _report(embedded.frozen, images, protocol).score.accuracy
    if options.grid:
        result["grid"] = _grid_of(embeddings, images, embedded.rule, options)
    if options.advise:
        result["advice"] = _advice(embeddings, images, embedded.rule)
    print_json(result)


def _protocol(plan: EpisodePlan, rule: Rule, options: argparse.Namespace) -> Protocol:
    from fewshot_engine.evaluation import Protocol  # torch: not for `--help`

    return Protocol(
        plan.way,
        plan.shot,
        plan.query,
        episodes=options.episodes,
        seed=options.seed,
        mode=options.mode,
        imbalance=options.imbalance,
        method=options.method,
        rule=rule,
    )


def _report(embeddings: NDArray[np.float32], images: LabelledImages, protocol: Protocol) -> Report:
    from fewshot_engine.evaluation import report

    return report(embeddings, images.labels, protocol, n_classes=len(images.classes), groups=images.groups)


def _grid(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not re.fullmatch(r"\d+(,\d+)*x\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not ways x shots, such as 5,10x1,5")
    ways, shots = (tuple(map(int, part.split(","))) for part in text.split("x"))
    return ways, shots


def _grid_of(
    embeddings: NDArray[np.float32], images: LabelledImages, rule: Rule, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Every cell with the Q that its K leaves."""
    from fewshot_engine.evaluation import evaluate

    cells = []
    for way in options.grid[0]:
        for shot in options.grid[1]:
            plan = check_episode(images.counts(), EpisodeConfig(way, shot, options.query))
            score = evaluate(
                embeddings,
                images.labels,
                way=plan.way,
                shot=plan.shot,
                query=plan.query,
                episodes=options.episodes,
                seed=options.seed,
                groups=images.groups,
                rule=rule,
            )
            cells.append({**asdict(score), "chance": plan.chance})
            say(f"{way}-way {shot}-shot: {score.accuracy:.1%} ± {score.ci95:.1%}")
    return cells


def _advice(embeddings: NDArray[np.float32], images: LabelledImages, usual: Rule) -> dict[str, Any]:
    """DIR taken as one label set, every photo an example."""
    from fewshot_engine.linear_head import advise
    from fewshot_engine.selection import candidates, choose_batch_method, choose_rule
    from fewshot_engine.transductive import METHODS

    present, labels = np.unique(images.labels, return_inverse=True)
    counts = dict(zip(images.classes, np.bincount(images.labels, minlength=len(images.classes)).tolist(), strict=True))
    head = advise({images.classes[label]: counts[images.classes[label]] for label in present})
    rule = choose_rule(candidates({"whole": embeddings}, labels, usual=usual), labels, len(present))
    batch = choose_batch_method(embeddings, labels, len(present), methods=tuple(METHODS))
    return {
        "classifier": head.classifier,
        "rule": rule.candidate.name,
        "batch": batch.method,
        "reasons": [head.reason, rule.reason, batch.reason],
    }


def embed_images(
    images: LabelledImages, encoder_name: str, options: argparse.Namespace, *, views: tuple[str, ...] = ("whole",)
) -> Embedded:
    """With a built-in encoder, a trained backbone, or a recipe over the embeddings of one."""
    # One thread for each forward pass, and a worker for each core: see `embed_files`.
    encoder, recipe = load_with_recipe(
        encoder_name, cache_dir=options.cache_dir, threads=1, device=options.device, views=views
    )
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
    embeddings, readable = np.stack(rows), keep_rows(images, np.array(kept))
    if recipe is None:
        return Embedded(readable, embeddings, tuple(refused), encoder.rule)
    adapted = recipe.apply(embeddings, familiarity=recipe.familiarity(embeddings))
    return Embedded(readable, adapted, tuple(refused), encoder.rule, frozen=embeddings)


def keep_rows(images: LabelledImages, rows: NDArray[np.int64]) -> LabelledImages:
    groups = None if images.groups is None else images.groups[rows]
    return LabelledImages(images.classes, images.labels[rows], tuple(images.paths[row] for row in rows), groups)


def print_json(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
