"""`classify` of the command line: photos sorted by a few examples of each label."""

from __future__ import annotations

import argparse
from pathlib import Path

from fewshot_engine import cli
from fewshot_engine.datasets import from_folder
from fewshot_engine.inference import (
    Predictions,
    PrototypeModel,
    classify,
    classify_batch,
    fit,
    mean_embedding,
    neighbours_in,
)
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
    sort.add_argument("--reject", action="store_true", help="leave the label empty where the verdict is none")
    cli.add_level(sort)
    cli.add_encoder(sort)


def _classify(options: argparse.Namespace) -> None:
    found, queries = from_folder(options.support, options.level), cli.photos_under(options.query)
    encoder, recipe = cli.load_encoder(options.encoder, options, views=options.views)
    examples = cli.embed_images(found, encoder)
    examples.check_examples()
    photos = cli.embed_images(queries, encoder, none_will_do=True)
    _, (support, embeddings) = cli.as_adapted(recipe, examples.embeddings, photos.embeddings)
    labels, classes = examples.images.labels, examples.images.classes
    centre = neighbours = None
    if options.mode == "pool" and len(embeddings):
        centre = mean_embedding(embeddings)
        neighbours = neighbours_in(embeddings, support, centre)
    ways = candidates(
        {"whole": support}, labels, centres={} if centre is None else {"whole": centre}, usual=encoder.rule
    )
    choice = choose_rule(ways, labels, len(classes))
    cli.say(choice.reason)
    model = fit(support, labels, len(classes), centre=centre, neighbours=neighbours, rule=choice.candidate.rule)
    if options.mode == "batch" and len(embeddings):
        answers = _together(model, support, labels, embeddings, options.top_k)
    else:
        answers = classify(model, embeddings, top_k=options.top_k)
    cli.print_answers(answers, photos, classes, top_k=options.top_k, reject=options.reject)
    if model.expected_accuracy is not None:
        margin = 100 * (model.expected_accuracy_ci or 0)
        cli.say(f"expected accuracy by leave-one-out: {100 * model.expected_accuracy:.0f} ± {margin:.0f} %")


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
