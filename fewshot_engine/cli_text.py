"""`zero-shot` and `project` of the command line: photos sorted by names, and embeddings as a map."""

from __future__ import annotations

import argparse
import csv
import io
import json
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt

from fewshot_engine import cli
from fewshot_engine.checkpoints import write_atomically
from fewshot_engine.datasets import LabelledImages, from_folder
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.inference import Predictions, classify, fit
from fewshot_engine.projection import Method, project
from fewshot_engine.prototypes import FloatArray
from fewshot_engine.text import (
    TextLabel,
    TextPredictions,
    TextPrototypes,
    fuse_with_shots,
    fusion_weight,
    load_concepts,
    text_logits,
    text_prototypes,
    zero_shot,
)

LEFT_OUT_AT_MOST = 100  # examples, by which the names' weight is chosen; more change nothing

ZERO_SHOT_HELP = """\
Sorts the photos of DIR by the names of labels alone: no examples, no network. A photo is compared through the 1,000
names that the encoder's classifier knows, so everyday things work and fine distinctions come out near chance. What is
expected of the names, and what they cannot tell apart, is said on standard error.

  python -m fewshot_engine zero-shot holiday/ --labels "beach: sea and sand" mountain "food: a dish on a plate"

prints a line for each photo, in any order of folders:
{"path": …, "label": "beach", "confidence": 0.81, "distance": 0.62, "stranger": 0.17, "top_k": […], "verdict": "known"}

  confidence  how sure the label is, given that the photo is one of the labels; a probability
  distance    between the photo's and the label's shares of the 1,000 names; with --support as in `classify`
  stranger    the probability that it is none of the labels; from names alone a weak guess
  verdict     known, unsure, none (of the labels) or refused (no photo; "reason" says why)

With --support, a folder of examples for each label, names and examples answer together; the more examples, the less
the names count. Where DIR has folders that are called as the labels are, the accuracy is told beside chance.
"""
PROJECT_HELP = """\
Draws embeddings as points on a plane, like beside like.

  python -m fewshot_engine embed photos/ --out photos.npz
  python -m fewshot_engine project photos.npz --method tsne --out map.json

A .json file holds {"method": "tsne", "seed": 0, "points": [{"path": …, "class": "beach", "x": -0.31, "y": 0.74}, …]},
a .csv file the columns path, class, x and y. Both directions run from -1 to 1 at most, in equal units.

  pca    seconds; keeps the large shapes
  umap   keeps neighbourhoods; compiles itself for about 40 s before it begins
  tsne   keeps neighbourhoods; half a minute for 5,000 photos

prints {"photos": 120, "method": "tsne", "out": "map.json", "seconds": 3.1, "refused": [{"path": …, "reason": …}]}
"""


def add_parsers(commands: cli.Commands) -> None:
    """Add the two commands to the engine's parser."""
    by_name = cli.add_command(
        commands,
        "zero-shot",
        _zero_shot,
        title="sort photos by the names of labels, without examples",
        explained=ZERO_SHOT_HELP,
    )
    by_name.add_argument("folder", type=Path, metavar="DIR", help="photos to sort, in any folders")
    by_name.add_argument(
        "--labels", nargs="+", required=True, metavar="LABEL", help='a name, or "name: description" in everyday words'
    )
    by_name.add_argument("--support", type=Path, metavar="DIR", help="examples, in a folder for each label")
    cli.add_top_k(by_name)
    by_name.add_argument(
        "--mode",
        choices=("inductive", "batch"),
        default="inductive",
        help="batch lets photos that look alike agree: for folders with several photos of most labels",
    )
    by_name.add_argument(
        "--encoder", default="fast", metavar="fast|accurate|NAME", help="accurate takes three times as long (fast)"
    )
    cli.add_device(by_name)

    plane = cli.add_command(
        commands, "project", _project, title="a map of embeddings: PCA, UMAP or t-SNE", explained=PROJECT_HELP
    )
    plane.add_argument("source", type=Path, metavar="DIR|FILE.npz", help="class folders, or what `embed` wrote")
    plane.add_argument("--method", choices=get_args(Method), default="pca", help="pca")
    plane.add_argument("--out", type=Path, required=True, metavar="FILE.json|FILE.csv")
    cli.add_seed(plane)
    cli.add_level(plane)
    cli.add_encoder(plane, usual="fast")


def _zero_shot(options: argparse.Namespace) -> None:
    labels = [TextLabel.parse(text) for text in options.labels]
    if options.support is not None and options.mode == "batch":
        raise ConfigError("--mode batch works from names alone: leave out --support, or use inductive")
    photos = cli.photos_under(options.folder)
    support = None if options.support is None else _support(options.support, labels)
    cli.say("Reading the names that the encoder knows; the first time takes up to half a minute.")
    prototypes = text_prototypes(labels, load_concepts(options.cache_dir, options.encoder))
    encoder, _ = cli.load_encoder(options.encoder, options)
    embedded = cli.embed_images(photos, encoder)
    if support is None:
        answers = zero_shot(embedded.embeddings, prototypes, top_k=len(labels), refine=options.mode == "batch")
    else:
        answers = _with_examples(embedded.embeddings, prototypes, cli.embed_images(support, encoder))
    cli.print_answers(answers, embedded, [label.name for label in labels], top_k=options.top_k)
    if support is None:
        _say_expectations(prototypes)
    _say_accuracy(embedded.images.paths, options.folder, answers, labels)


def _support(folder: Path, labels: Sequence[TextLabel]) -> LabelledImages:
    """The examples, with labels in the order of `labels`."""
    paths = cli.photos_under(folder).paths
    own = _labels_by_folder(paths, folder, labels)
    lost = [label.name for row, label in enumerate(labels) if row not in own]
    if lost:
        raise DataError(f"{folder} has no folder of examples for {', '.join(lost)}: every label needs one")
    rows = np.flatnonzero(own >= 0)
    return LabelledImages(tuple(label.name for label in labels), own[rows], tuple(paths[row] for row in rows))


def _with_examples(embeddings: FloatArray, prototypes: TextPrototypes, examples: cli.Embedded) -> TextPredictions:
    """Names and examples together, weighted by leave-one-out."""
    examples.check_examples()
    support, labels, n_way = examples.embeddings, examples.images.labels, prototypes.n_way
    likeness = prototypes.concepts.known.likeness(support)
    model = fit(support, labels, n_way, likeness=likeness)
    rows, left_out = _left_out(support, labels, n_way)
    text = text_logits(support[rows], prototypes)
    weight = fusion_weight(text, left_out, labels[rows], shots=len(labels) / n_way)
    cli.say(f"The names count {weight:.2f} times, the {len(labels)} examples once.")
    confidences, distances, stranger = _all_labels(classify(model, embeddings, top_k=n_way))
    fused = fuse_with_shots(text_logits(embeddings, prototypes), np.log(np.maximum(confidences, 1e-12)), weight)
    order = np.argsort(-fused, axis=1, kind="stable")
    return TextPredictions(
        labels=order,
        confidences=np.take_along_axis(fused, order, axis=1).astype(np.float32),
        distances=np.take_along_axis(distances, order, axis=1),
        stranger=stranger,
    )


def _left_out(
    support: FloatArray, labels: npt.NDArray[np.int64], n_way: int
) -> tuple[npt.NDArray[np.int64], FloatArray]:
    """Rows of examples that have company, and the logarithms of their confidences by the set without them."""
    rows = np.flatnonzero(np.bincount(labels, minlength=n_way)[labels] > 1)
    rows = rows[:: -(-len(rows) // LEFT_OUT_AT_MOST) or 1]
    logs = np.zeros((len(rows), n_way), dtype=np.float32)
    for place, row in enumerate(rows):
        others = np.arange(len(labels)) != row
        model = fit(support[others], labels[others], n_way)
        confidences, _, _ = _all_labels(classify(model, support[[row]], top_k=n_way))
        logs[place] = np.log(np.maximum(confidences[0], 1e-12))
    return rows, logs


def _all_labels(answers: Predictions) -> tuple[FloatArray, FloatArray, npt.NDArray[np.float32]]:
    """Confidences and distances by label instead of by rank, (n, n_way) each; and the strangers' probability."""
    confidences, distances = np.empty_like(answers.confidences), np.empty_like(answers.distances)
    np.put_along_axis(confidences, answers.labels, answers.confidences, axis=1)
    np.put_along_axis(distances, answers.labels, answers.distances, axis=1)
    return confidences, distances, answers.stranger


def _say_expectations(prototypes: TextPrototypes) -> None:
    if not prototypes.is_weak:  # where they are, the first doubt says the figures
        cli.say(
            f"By these names about {prototypes.expected_accuracy:.0%} of photos are expected to be right; "
            f"guessing makes {prototypes.chance:.0%}."
        )
    for doubt in prototypes.doubts():
        cli.say(doubt)


def _say_accuracy(paths: Sequence[str], root: Path, answers: TextPredictions, labels: Sequence[TextLabel]) -> None:
    """For photos in folders that are called as the labels are; nothing where there are none."""
    truth = _labels_by_folder(paths, root, labels)
    known = truth >= 0
    if known.any():
        accuracy = float((answers.labels[known, 0] == truth[known]).mean())
        cli.say(
            f"Accuracy {accuracy:.1%} on {int(known.sum())} photos in folders called as the labels are; "
            f"chance {1 / len(labels):.1%}."
        )


def _labels_by_folder(paths: Sequence[str], root: Path, labels: Sequence[TextLabel]) -> npt.NDArray[np.int64]:
    """(n,) the label that the innermost folder with a label's name stands for; -1 for photos in no such folder."""
    place = {_plain(label.name): row for row, label in enumerate(labels)}
    found = []
    for path in paths:
        folders = Path(path).relative_to(root).parts[-2::-1]  # innermost first
        found.append(next((place[_plain(name)] for name in folders if _plain(name) in place), -1))
    return np.array(found, dtype=np.int64)


def _plain(name: str) -> str:
    """Folder names and labels differ in case, dashes and underscores."""
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())


def _project(options: argparse.Namespace) -> None:
    kind = options.out.suffix.lower()
    if kind not in (".json", ".csv"):
        raise ConfigError(f"--out is {options.out.name}: a map is written as .json or .csv")
    images, embeddings, refused = _embedded(options)
    if options.method == "umap":
        cli.say("UMAP compiles itself first, for about 40 s.")
    started = time.monotonic()
    points = project(embeddings, options.method, seed=options.seed)
    seconds = round(time.monotonic() - started, 1)
    rows = [
        {"path": path, "class": images.classes[label], "x": round(float(x), 4), "y": round(float(y), 4)}
        for path, label, (x, y) in zip(images.paths, images.labels, points, strict=True)
    ]
    if kind == ".json":
        content = json.dumps({"method": options.method, "seed": options.seed, "points": rows}, ensure_ascii=False)
    else:
        table = io.StringIO()
        writer = csv.DictWriter(table, ("path", "class", "x", "y"))
        writer.writeheader()
        writer.writerows(rows)
        content = table.getvalue()
    write_atomically(options.out, content.encode())
    cli.print_json(
        {
            "photos": len(rows),
            "method": options.method,
            "out": str(options.out),
            "seconds": seconds,
            "refused": list(refused),
        }
    )


def _embedded(options: argparse.Namespace) -> tuple[LabelledImages, FloatArray, Sequence[dict[str, str]]]:
    """Of a folder, or as `embed` wrote them."""
    if options.source.suffix.lower() != ".npz":
        found = from_folder(options.source, options.level)
        encoder, recipe = cli.load_encoder(options.encoder, options, views=options.views)
        embedded = cli.embed_images(found, encoder)
        _, (embeddings,) = cli.as_adapted(recipe, embedded.embeddings)
        return embedded.images, embeddings, embedded.refused
    try:
        with np.load(options.source, allow_pickle=False) as arrays:
            classes, paths = tuple(map(str, arrays["classes"])), tuple(map(str, arrays["paths"]))
            images, embeddings = LabelledImages(classes, arrays["labels"], paths), arrays["embeddings"]
    except FileNotFoundError as error:
        raise DataError(f"there is no file {options.source}") from error
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{options.source} is not what `embed` writes: {error}") from error
    if embeddings.ndim != 2 or len(embeddings) != len(paths) or not np.isfinite(embeddings).all():
        raise DataError(f"{options.source} holds embeddings of shape {embeddings.shape} for {len(paths)} photos")
    return images, embeddings, ()
