"""`classify` of the command line: photos sorted by a few examples of each label, or by many."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from fewshot_engine import cli
from fewshot_engine.datasets import from_folder
from fewshot_engine.errors import ConfigError
from fewshot_engine.inference import (
    Predictions,
    PrototypeModel,
    classify,
    classify_batch,
    fit,
    mean_embedding,
    neighbours_in,
)
from fewshot_engine.linear_head import advise, classify_by_head, fit_linear_head
from fewshot_engine.prototypes import FloatArray, IntArray
from fewshot_engine.selection import candidates, choose_batch_method, choose_rule
from fewshot_engine.transductive import METHODS

EXPLAINED = """\
Learns the labels from the folders of --support, one folder a label with 1 to 10 examples each, and sorts the photos of
--query. No training: a label is a prototype made of its examples' embeddings, and the nearest one answers.

  python -m fewshot_engine classify --support examples/ --query holiday/ > answers.jsonl

prints a line for each photo, in any order of folders:
{"path": …, "label": "beach", "confidence": 0.93, "distance": 0.21, "stranger": 0.04, "top_k": […], "verdict": "known"}

  confidence  how sure the label is, given that the photo is one of the labels; a probability
  distance    to the label's prototype
  stranger    the probability that it is none of the labels
  verdict     known, unsure, none (of the labels) or refused (no photo; "reason" says why)

Modes: inductive looks at each photo alone; pool also looks at all the photos of --query, at their mean and at what lies
near each example, which is worth about 4 points with one example a label and nothing with five; batch lets the photos
of --query help each other, which is worth about 5 points with one example a label and little with five. How labels
answer, and whether a batch is answered together, is chosen by trying it on the examples; standard error says what was
found.

Classifiers: prototypes, or above 100 examples of each label a linear head, which can tell labels apart whose prototypes
lie close. auto (the default) does so in --mode inductive; prototypes and linear ask for one of them, linear in --mode
inductive alone. The head's confidence is calibrated on examples that it did not see; distance and stranger stay those
of the prototypes.

  python -m fewshot_engine classify --support archive/ --query new/ --classifier linear
"""


def add_parsers(commands: cli.Commands) -> None:
    """Add the command to the engine's parser."""
    sort = cli.add_command(
        commands,
        "classify",
        _classify,
        title="sort photos by a few examples; one JSON object a line, a line a photo",
        explained=EXPLAINED,
    )
    sort.add_argument("--support", type=Path, required=True, metavar="DIR", help="a folder of examples for each label")
    sort.add_argument("--query", type=Path, required=True, metavar="DIR", help="photos to sort, in any folders")
    cli.add_top_k(sort)
    sort.add_argument(
        "--mode", choices=("inductive", "pool", "batch"), default="inductive", help="what else is looked at"
    )
    sort.add_argument(
        "--classifier",
        choices=("auto", "prototypes", "linear"),
        default="auto",
        help="auto is linear above 100 examples of each label (auto)",
    )
    sort.add_argument("--reject", action="store_true", help="leave the label empty where the verdict is none")
    cli.add_level(sort)
    cli.add_encoder(sort)


def _classify(options: argparse.Namespace) -> None:
    if options.classifier == "linear" and options.mode != "inductive":
        raise ConfigError(
            f"--mode {options.mode} goes with prototypes, a linear head answers each photo alone: leave one out"
        )
    found, queries = from_folder(options.support, options.level), cli.photos_under(options.query)
    encoder, recipe = cli.load_encoder(options.encoder, options, views=options.views)
    examples = cli.embed_images(found, encoder)
    examples.check_examples()
    photos = cli.embed_images(queries, encoder, none_will_do=True)
    familiarity, (support, embeddings) = cli.as_adapted(recipe, examples.embeddings, photos.embeddings)
    likeness: FloatArray | None = cli.likeness(encoder, recipe, examples.embeddings, familiarity)
    labels, classes = examples.images.labels, examples.images.classes
    is_linear = _is_linear(options, examples.images.counts())
    centre = None
    if options.mode == "pool" and len(embeddings):
        centre = mean_embedding(embeddings)
        neighbours = neighbours_in(embeddings, support, centre)
        likeness = neighbours if likeness is None else likeness + neighbours
    ways = candidates(
        {"whole": support}, labels, centres={} if centre is None else {"whole": centre}, usual=encoder.rule
    )
    choice = choose_rule(ways, labels, len(classes))
    cli.say(choice.reason)
    model = fit(support, labels, len(classes), centre=centre, likeness=likeness, rule=choice.candidate.rule)
    if is_linear:
        answers = _by_head(model, support, labels, embeddings, options.top_k)
    elif options.mode == "batch" and len(embeddings):
        answers = _together(model, support, labels, embeddings, options.top_k)
    else:
        answers = classify(model, embeddings, top_k=options.top_k)
    cli.print_answers(answers, photos, classes, top_k=options.top_k, reject=options.reject)
    if model.expected_accuracy is not None and not is_linear:
        margin = 100 * (model.expected_accuracy_ci or 0)
        cli.say(f"expected accuracy by leave-one-out: {100 * model.expected_accuracy:.0f} ± {margin:.0f} %")


def _is_linear(options: argparse.Namespace, examples: Mapping[str, int]) -> bool:
    """Whether a linear head answers, which is said with its reason."""
    advice, why = advise(examples), ""
    is_linear = advice.classifier == "linear head"
    if options.classifier != "auto":
        is_linear, why = options.classifier == "linear", ", as asked for"
    elif options.mode != "inductive":
        is_linear, why = False, f", as --mode {options.mode} needs them"
    cli.say(f"{'A linear head answers' if is_linear else 'Prototypes answer'}{why}. {advice.reason}")
    return is_linear


def _by_head(
    model: PrototypeModel, support: FloatArray, labels: IntArray, queries: FloatArray, top_k: int
) -> Predictions:
    head = fit_linear_head(support, labels, model.n_way)
    if head.expected_accuracy is None:
        cli.say("No photo of some label could be held out, so the head's confidences are not calibrated.")
    else:
        cli.say(f"The head recognises {100 * head.expected_accuracy:.0f} % of {len(labels)} examples held out in turn.")
    return classify_by_head(head, model, queries, top_k=top_k)


def _together(
    model: PrototypeModel, support: FloatArray, labels: IntArray, queries: FloatArray, top_k: int
) -> Predictions:
    """Answered as a batch, where that does better on the examples."""
    choice = choose_batch_method(support, labels, model.n_way, methods=tuple(METHODS))
    cli.say(choice.reason)
    if choice.method is None:
        return classify(model, queries, top_k=top_k)
    answers, changed = classify_batch(model, queries, top_k=top_k, method=choice.method)
    cli.say(f"{int(changed.sum())} of {len(changed)} answers are others than each photo alone would have got")
    return answers
