"""The engine's command line: results as JSON on standard output, progress and complaints on standard error."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fewshot_engine import weights
from fewshot_engine.backbones import BACKBONES, Backbone, get_backbone
from fewshot_engine.datasets import PHOTO_SUFFIXES, LabelledImages, from_folder
from fewshot_engine.encoder import Embedded, Encoder, embed_files, load_with_recipe
from fewshot_engine.errors import CheckpointError, ConfigError, DataError, EngineError, WeightsMissing
from fewshot_engine.framing import VIEWS
from fewshot_engine.inference import (
    Predictions,
    PrototypeModel,
    classify,
    classify_batch,
    fit,
    mean_embedding,
    neighbours_in,
    verdict,
)
from fewshot_engine.recipes import Recipe
from fewshot_engine.selection import candidates, choose_batch_method, choose_rule
from fewshot_engine.transductive import METHODS, Method
from fewshot_engine.weights import default_cache_dir

ENCODER_HELP = """\
Encoders: accurate (EfficientNet-Lite0, -Lite1 and -Lite2 side by side, the default), fast (Lite0 alone: a third of
the work, 2 to 4 points less at 1 shot), the name of a backbone (`weights --list` shows them), or a folder that `train`
wrote. The first use of one exports it to ONNX, which takes some seconds and is kept in --cache-dir.
"""
EMBED_HELP = """\
Writes an .npz file with the arrays embeddings (n, dim) float32, labels (n,) int64, classes and paths; row i is the
photo paths[i] of the class classes[labels[i]]. A file that is no photo is skipped and named.

  python -m fewshot_engine embed photos/ --out photos.npz

prints {"photos": 120, "classes": 6, "refused": [{"path": …, "reason": …}], "photos_per_s": 31.5}
"""
CLASSIFY_HELP = """\
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
WEIGHTS_HELP = """\
Pretrained weights that no package carries are fetched once, checked, and kept for every later use without a network.

  python -m fewshot_engine weights --list                     what there is, and where its weights are
  python -m fewshot_engine weights resnet50                   fetch from its hub
  python -m fewshot_engine weights timm:vit_small_patch14_dinov2.lvd142m
  python -m fewshot_engine weights open_clip:ViT-B-32/laion2b_s34b_b79k
  python -m fewshot_engine weights resnet50 --from resnet50-11ad3fa6.pth

A file is a state dict as the backbone's own library saves it, as safetensors or as torch.save writes it; it is read
without executing anything in it. timm: and open_clip: need `pip install fewshot-studio[more-backbones]`.

prints {"name": …, "file": …, "sha256": …, "source": …, "source_sha256": …}; --list a line for each backbone:
{"name": …, "title": …, "dim": …, "image_size": …, "licence": …, "weights": "in its package" | "kept" | "to be fetched"
| "none: trained from scratch"}
"""
EXPORT_HELP = """\
Writes a zip that runs anywhere ONNX Runtime does, without this engine: model.onnx (pixels in, embeddings out, with an
adapted model's map in the graph), model.json (inputs, origin, the model's card), recipe.safetensors (an adapted model's
centre and map), LICENCES.txt and README.txt with the ten lines of Python that use it.

  python -m fewshot_engine export runs/birds --out birds.zip

prints what model.json says; largest_difference is what was measured between the graph and the encoder.
"""
BENCH_HELP = """\
  python -m fewshot_engine bench --what embed      photos a second, from files and of the bare forward pass
  python -m fewshot_engine bench --what classify   from examples to an answer, and milliseconds for one photo
  python -m fewshot_engine bench --what train      episodes a second of adapt, at the encoder's dimension

The photos are drawn for the purpose. `make bench` compares with other people's code.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 after a sentence on standard error."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int | None] = options.run
    try:
        return command(options) or 0
    except (EngineError, OSError) as error:
        print(f"fewshot_engine: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fewshot_engine", description=__doc__, epilog="COMMAND --help explains each with an example."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    embed = _add(commands, "embed", "embeddings of a folder of class folders, as an .npz file", EMBED_HELP)
    embed.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="embeddings, labels, classes, paths")
    _add_level(embed)
    _add_encoder(embed)
    embed.set_defaults(run=_embed)

    sort = _add(
        commands, "classify", "sort photos by a few examples; one JSON object a line, a line a photo", CLASSIFY_HELP
    )
    sort.add_argument("--support", type=Path, required=True, metavar="DIR", help="a folder of examples for each label")
    sort.add_argument("--query", type=Path, required=True, metavar="DIR", help="photos to sort, in any folders")
    sort.add_argument("--top-k", type=_positive, default=3, metavar="K", help="labels to list for each photo (3)")
    sort.add_argument(
        "--mode", choices=("inductive", "pool", "batch"), default="inductive", help="what else is looked at"
    )
    sort.add_argument("--reject", action="store_true", help="leave the label empty where the verdict is none")
    _add_level(sort)
    _add_encoder(sort)
    sort.set_defaults(run=_classify)

    take = _add(commands, "weights", "fetch pretrained weights, take them from a file, or list them", WEIGHTS_HELP)
    take.add_argument("name", nargs="?", metavar="NAME", help="a backbone")
    take.add_argument("--from", dest="file", type=Path, metavar="FILE", help="a state dict, instead of a hub")
    take.add_argument("--list", action="store_true", help="every backbone, and where its weights are")
    _add_json(take)
    take.set_defaults(run=_weights)

    export = _add(commands, "export", "a model as a zip that ONNX Runtime can run without this engine", EXPORT_HELP)
    export.add_argument("model", metavar="CKPT", help="a folder that `train` wrote, or the name of an encoder")
    export.add_argument("--out", type=Path, required=True, metavar="BUNDLE.zip")
    _add_cache(export)
    export.set_defaults(run=_export)

    bench = _add(commands, "bench", "how fast this machine embeds, answers and trains", BENCH_HELP)
    bench.add_argument("--what", choices=("embed", "train", "classify"), default="embed")
    bench.add_argument("--photos", type=_positive, default=300, help="drawn for the purpose (300)")
    _add_encoder(bench)
    bench.set_defaults(run=_bench)

    for module in ("cli_train", "cli_evaluate", "cli_text"):  # they import this one
        importlib.import_module(f"fewshot_engine.{module}").add_parsers(commands)
    return parser


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, title: str, explained: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=title,
        description=f"{title[0].upper()}{title[1:]}.\n\n{explained}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level", default="leaf", help="which folders are the classes: leaf (the default), top or 1, 2…"
    )


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.epilog = ENCODER_HELP
    parser.add_argument("--encoder", default="accurate", metavar="accurate|fast|NAME|CKPT", help="see below")
    parser.add_argument(
        "--views",
        type=lambda text: tuple(text.split(",")),
        default=("whole",),
        metavar="VIEW,…",
        help=f"what of each photo is looked at and averaged: {', '.join(VIEWS)}; crop:0.65 says how tight (whole)",
    )
    parser.add_argument("--device", help="cpu or cuda; a GPU is taken where there is one")
    _add_cache(parser)


def _add_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where exported encoders are kept")
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="accepted everywhere; the output is JSON in any case")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def _embed(options: argparse.Namespace) -> None:
    images = from_folder(options.folder, options.level)
    encoder, recipe = _encoder(options)
    started = time.monotonic()
    embeddings, kept, refused = _embeddings(list(map(Path, images.paths)), encoder)
    if recipe is not None and len(embeddings):
        embeddings = recipe.apply(embeddings, familiarity=_familiarity(recipe, embeddings))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "wb") as file:  # np.savez would add a suffix to a bare name
        np.savez(
            file,
            embeddings=embeddings,
            labels=images.labels[kept],
            classes=np.array(images.classes),
            paths=np.array(images.paths)[kept],
        )
    seconds = time.monotonic() - started
    rate = round(len(kept) / seconds, 1)
    _print({"photos": len(kept), "classes": len(images.classes), "refused": refused, "photos_per_s": rate})


def _classify(options: argparse.Namespace) -> None:
    support = from_folder(options.support, options.level)
    queries = _photos_under(options.query)
    encoder, recipe = _encoder(options)
    examples, kept, _ = _embeddings(list(map(Path, support.paths)), encoder)
    classes, labels = _classes_left(support, kept)
    embeddings, answered, refused = _embeddings(queries, encoder)
    if recipe is not None:
        familiarity = _familiarity(recipe, examples)
        examples, embeddings = (recipe.apply(rows, familiarity=familiarity) for rows in (examples, embeddings))
    centre = neighbours = None
    if options.mode == "pool" and len(embeddings):
        centre = mean_embedding(embeddings)
        neighbours = neighbours_in(embeddings, examples, centre)
    ways = candidates(
        {"whole": examples}, labels, centres={} if centre is None else {"whole": centre}, usual=encoder.rule
    )
    choice = choose_rule(ways, labels, len(classes))
    _say(choice.reason)
    model = fit(examples, labels, len(classes), centre=centre, neighbours=neighbours, rule=choice.candidate.rule)
    together = _batch_method(examples, labels, len(classes)) if options.mode == "batch" and len(embeddings) else None
    if together is not None:
        answers, changed = classify_batch(model, embeddings, top_k=options.top_k, method=together)
        _say(f"{int(changed.sum())} of {len(changed)} answers are others than each photo alone would have got")
    else:
        answers = classify(model, embeddings, top_k=options.top_k)
    for row, index in enumerate(answered):
        _print({"path": str(queries[index]), **_answer(answers, row, classes, reject=options.reject)})
    for refusal in refused:
        _print({**refusal, "label": None, "verdict": "refused"})
    _say_expected(model)


def _batch_method(examples: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], n_way: int) -> Method | None:
    choice = choose_batch_method(examples, labels, n_way, methods=tuple(METHODS))
    _say(choice.reason)
    return choice.method


def _classes_left(
    support: LabelledImages, kept: npt.NDArray[np.int64]
) -> tuple[tuple[str, ...], npt.NDArray[np.int64]]:
    """Class names and labels of the examples that could be read; a class that lost all of them is named."""
    present, labels = np.unique(support.labels[kept], return_inverse=True)
    lost = [name for number, name in enumerate(support.classes) if number not in present]
    if lost:
        raise DataError(f"no example of {', '.join(lost)} can be read: replace its photos, or take the folder away")
    return support.classes, labels.astype(np.int64)


def _answer(answers: Predictions, row: int, classes: Sequence[str], *, reject: bool) -> dict[str, Any]:
    confidence, stranger = float(answers.confidences[row, 0]), float(answers.stranger[row])
    said = verdict(confidence, stranger)
    top = zip(answers.labels[row], answers.confidences[row], answers.distances[row], strict=True)
    return {
        "label": None if reject and said == "none" else classes[answers.labels[row, 0]],
        "confidence": round(confidence, 4),
        "distance": round(float(answers.distances[row, 0]), 4),
        "stranger": round(stranger, 4),
        "top_k": [
            {"label": classes[label], "confidence": round(float(share), 4), "distance": round(float(distance), 4)}
            for label, share, distance in top
        ],
        "verdict": said,
    }


def _say_expected(model: PrototypeModel) -> None:
    if model.expected_accuracy is not None:
        margin = 100 * (model.expected_accuracy_ci or 0)
        _say(f"expected accuracy by leave-one-out: {100 * model.expected_accuracy:.0f} ± {margin:.0f} %")


def _weights(options: argparse.Namespace) -> None:
    if options.list:
        for name in [*BACKBONES, *(name for name in weights.kept_names() if name not in BACKBONES)]:
            backbone = get_backbone(name)
            _print(
                {
                    "name": name,
                    "title": backbone.title,
                    "dim": backbone.dim(),
                    "image_size": backbone.image_size,
                    "licence": backbone.licence,
                    "weights": _where(backbone),
                }
            )
        return
    if options.name is None:
        raise ConfigError("name a backbone, or ask for --list")
    record = get_backbone(options.name).take_weights(options.file, say=_say)
    _print({key: getattr(record, key) for key in ("name", "file", "sha256", "source", "source_sha256")})


def _where(backbone: Backbone) -> str:
    if not backbone.pretrained:
        return "none: trained from scratch"
    try:
        return "kept" if weights.is_kept(backbone.weights()) else "in its package"
    except WeightsMissing:
        return "to be fetched"
    except CheckpointError as error:
        return str(error)


def _export(options: argparse.Namespace) -> None:
    from fewshot_engine.bundle import write_bundle  # torch comes with it

    _print(write_bundle(options.model, options.out, cache_dir=options.cache_dir))


def _bench(options: argparse.Namespace) -> None:
    from fewshot_engine.measuring import draw_photos, measure_classifying, measure_embedding, measure_training

    encoder, _ = _encoder(options)
    if options.what == "train":
        _print({"what": "train", **measure_training(encoder.dim)})
        return
    measure = measure_embedding if options.what == "embed" else measure_classifying
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), options.photos)
        _print({"what": options.what, **measure(encoder, paths)})


def _encoder(options: argparse.Namespace) -> tuple[Encoder, Recipe | None]:
    # One thread for each forward pass, and a worker for each core: see `embed_files`.
    return load_with_recipe(
        options.encoder, cache_dir=options.cache_dir, threads=1, device=options.device, views=options.views
    )


def _familiarity(recipe: Recipe, embeddings: npt.NDArray[np.float32]) -> float:
    familiarity = recipe.familiarity(embeddings)
    _say(f"{familiarity:.0%} familiar: that is the adapted part's share of the say, the frozen encoder has the rest")
    return familiarity


def _embeddings(
    paths: list[Path], encoder: Encoder
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[dict[str, str]]]:
    """Embeddings (n, dim) of the files that are photos, their places in `paths` (n,), and why the others are not."""
    rows, kept, refused = [], [], []
    for done in _with_progress(embed_files(paths, encoder, workers=os.cpu_count() or 1), len(paths)):
        if done.embedding is None:
            refused.append({"path": str(done.path), "reason": done.refused or ""})
            _say(f"refused {done.path}: {done.refused}")
        else:
            rows.append(done.embedding)
            kept.append(done.index)
    embeddings = np.stack(rows) if rows else np.empty((0, encoder.dim), dtype=np.float32)
    return embeddings, np.array(kept, dtype=np.int64), refused


def _with_progress(items: Iterator[Embedded], total: int) -> Iterator[Embedded]:
    started = told = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= 1 or count == total:
            told = now
            _say(f"{count} of {total} photos, {count / max(now - started, 1e-9):.0f}/s")


def _photos_under(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file())
    if not found:
        raise DataError(f"{folder} holds no photos")
    return found


def _print(result: dict[str, Any]) -> None:
    print(json.dumps(result, ensure_ascii=False), flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
