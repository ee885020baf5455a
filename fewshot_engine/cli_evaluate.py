"""`evaluate` of the command line: one JSON object on standard output, progress on standard error."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fewshot_engine import cli
from fewshot_engine.config import EpisodeConfig
from fewshot_engine.datasets import EpisodePlan, LabelledImages, check_episode, from_folder
from fewshot_engine.encoder import load_untrained
from fewshot_engine.errors import ConfigError
from fewshot_engine.prototypes import Rule

if TYPE_CHECKING:
    from fewshot_engine.evaluation import Protocol, Report

EXPLAINED = """\
Draws episodes from DIR, a folder of class folders: N classes (--way), K examples of each (--shot), Q photos of each to
recognise (--query). The answers are those of `classify` by prototypes. Where a class has fewer than K + Q photos, Q
shrinks for all; one with fewer than K + 1 is named and left out.

  python -m fewshot_engine evaluate photos/ --way 5 --shot 1
  python -m fewshot_engine evaluate photos/ --shot 5 --mode batch --imbalance 2
  python -m fewshot_engine evaluate photos/ --grid 5,10,20x1,5

prints one object:
  accuracy, ci95         the mean over the episodes, and half the width of its 95 % interval
  chance, class_means    what guessing gives, and the plain nearest class mean by cosine, on the same episodes
  inductive, changed     in the other modes: accuracy without what the mode adds; in batch, the share of other answers
  frozen, familiarity    for a model of the kind adapt: accuracy of the encoder that it began with; and how much the
                         photos are of the kind that it was adapted to, 0 to 1: by that its own part has a say
  untrained              for a model of the kind full: accuracy of its network before any training
  calibration_error      how far confidences are from hit rates; 0.02 is good
  stranger_auroc         how well photos of N classes without examples are told from the others; 0.5 is guessing
  intra_class, inter_class, ratio   cosine distances within and between classes; the smaller the ratio, the better
  per_class, confusions  accuracy of each class, and what the ten worst mistakes are

Modes: inductive looks at the examples alone; pool also at DIR's photos, without their labels (their mean, and what lies
near each example); batch also at the other photos that are to be recognised. Real batches are not balanced: with
--imbalance 2 the classes have Dirichlet shares of N x Q photos, as in Veilleux et al. 2021, and figures are lower and
more honest.
"""


def add_parsers(commands: cli.Commands) -> None:
    """Add the command to the engine's parser."""
    evaluate = cli.add_command(
        commands,
        "evaluate",
        _evaluate,
        title="N-way K-shot accuracy of an encoder, with its 95 %% interval",
        explained=EXPLAINED,
    )
    evaluate.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    cli.add_episode(evaluate, shot=1)
    evaluate.add_argument("--episodes", type=int, default=600, help="how many; an interval to quote takes 600 (600)")
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
    evaluate.add_argument("--threads", type=int, help="of torch on the CPU")
    cli.add_level(evaluate)
    cli.add_seed(evaluate)
    cli.add_encoder(evaluate)


def _evaluate(options: argparse.Namespace) -> None:
    episode = EpisodeConfig(options.way, options.shot, options.query)
    if options.grid and (options.mode != "inductive" or options.imbalance is not None):
        raise ConfigError("--grid is inductive and balanced: take --mode and --imbalance away, or the grid")
    found = from_folder(options.folder, options.level)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    # Mistakes come before the minutes that embedding takes.
    _protocol(check_episode(found.counts(), episode), Rule(), options)
    encoder, recipe = cli.load_encoder(options.encoder, options, views=options.views)
    photos = cli.embed_images(found, encoder)
    images = photos.images
    familiarity, (embeddings,) = cli.as_adapted(recipe, photos.embeddings)
    plan = check_episode(images.counts(), episode)
    for note in plan.notes:
        cli.say(note)
    protocol = _protocol(plan, encoder.rule, options)
    likeness = cli.likeness(encoder, recipe, photos.embeddings, familiarity)
    result = {
        **_report(embeddings, likeness, images, protocol).to_dict(images.classes),
        "encoder": options.encoder,
        "views": list(options.views),
        "left_out": [list(pair) for pair in plan.left_out],
        "notes": plan.notes,
        "refused": photos.refused,
    }
    if familiarity is not None:
        known = encoder.likeness(photos.embeddings)
        result["frozen"] = _report(photos.embeddings, known, images, protocol).score.accuracy
        result["familiarity"] = round(familiarity, 4)
    if encoder.rule == Rule.usual(is_full=True):
        result["untrained"] = _untrained(found, images, protocol, options)
    if options.grid:
        result["grid"] = _grid_of(embeddings, likeness, images, encoder.rule, options)
    if options.advise:
        result["advice"] = _advice(embeddings, images, encoder.rule)
    cli.print_json(result)


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


def _report(
    embeddings: NDArray[np.float32],
    likeness: NDArray[np.float32] | None,
    images: LabelledImages,
    protocol: Protocol,
) -> Report:
    from fewshot_engine.evaluation import report

    return report(
        embeddings,
        images.labels,
        protocol,
        n_classes=len(images.classes),
        groups=images.groups,
        likeness=likeness,
    )


def _untrained(
    found: LabelledImages, images: LabelledImages, protocol: Protocol, options: argparse.Namespace
) -> float | None:
    """Accuracy of a *full* model's network as it was before any training; None where that cannot be told."""
    before = load_untrained(
        options.encoder, cache_dir=options.cache_dir, threads=1, device=options.device, views=options.views
    )
    if before is None:
        return None
    cli.say("Once more, with the network as it was before any training.")
    return _report(cli.embed_images(found, before).embeddings, None, images, protocol).score.accuracy


def _grid(text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not re.fullmatch(r"\d+(,\d+)*x\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not ways x shots, such as 5,10x1,5")
    ways, shots = (tuple(map(int, part.split(","))) for part in text.split("x"))
    return ways, shots


def _grid_of(
    embeddings: NDArray[np.float32],
    likeness: NDArray[np.float32] | None,
    images: LabelledImages,
    rule: Rule,
    options: argparse.Namespace,
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
                likeness=likeness,
            )
            cells.append({**asdict(score), "chance": plan.chance})
            cli.say(f"{way}-way {shot}-shot: {score.accuracy:.1%} ± {score.ci95:.1%}")
    return cells


def _advice(embeddings: NDArray[np.float32], images: LabelledImages, usual: Rule) -> dict[str, Any]:
    """DIR taken as one label set, every photo an example."""
    from fewshot_engine.linear_head import advise
    from fewshot_engine.selection import candidates, choose_batch_method, choose_rule
    from fewshot_engine.transductive import METHODS

    present, labels = np.unique(images.labels, return_inverse=True)
    head = advise({name: count for name, count in images.counts().items() if count})
    rule = choose_rule(candidates({"whole": embeddings}, labels, usual=usual), labels, len(present))
    batch = choose_batch_method(embeddings, labels, len(present), methods=tuple(METHODS))
    return {
        "classifier": head.classifier,
        "rule": rule.candidate.name,
        "batch": batch.method,
        "reasons": [head.reason, rule.reason, batch.reason],
    }
