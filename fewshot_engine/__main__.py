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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewshot_engine import config
from fewshot_engine.config import DEFAULT_ENCODER
from fewshot_engine.datasets import PHOTO_SUFFIXES, LabelledImages, from_folder
from fewshot_engine.encoder import Embedded, Encoder, embed_files, load_encoder
from fewshot_engine.errors import DataError, EngineError
from fewshot_engine.inference import Predictions, PrototypeModel, classify, fit, mean_embedding, verdict

ENCODERS = {name: name for name in config.ENCODERS}  # `load_encoder` knows them; for whoever still asks here


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
    parser = argparse.ArgumentParser(prog="python -m fewshot_engine", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    embed = commands.add_parser("embed", help="embeddings of a folder of class folders, as an .npz file")
    embed.add_argument("folder", type=Path, metavar="DIR", help="a folder of class folders, nested or not")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE.npz", help="embeddings, labels, classes, paths")
    _add_level(embed)
    _add_encoder(embed)
    embed.set_defaults(run=_embed)

    sort = commands.add_parser("classify", help="sort photos by a few examples; one JSON object a line, a line a photo")
    sort.add_argument("--support", type=Path, required=True, metavar="DIR", help="a folder of examples for each label")
    sort.add_argument("--query", type=Path, required=True, metavar="DIR", help="photos to sort, in any folders")
    sort.add_argument("--top-k", type=_positive, default=3, metavar="K", help="labels to list for each photo (3)")
    sort.add_argument("--mode", choices=("inductive", "pool"), default="inductive", help="pool centres by the queries")
    sort.add_argument("--reject", action="store_true", help="leave the label empty where the verdict is none")
    _add_level(sort)
    _add_encoder(sort)
    sort.set_defaults(run=_classify)

    bench = commands.add_parser("bench", help="photos a second on this machine, from files and bare")
    bench.add_argument("--what", choices=("embed",), default="embed")
    bench.add_argument("--photos", type=_positive, default=300, help="drawn for the purpose (300)")
    _add_encoder(bench)
    bench.set_defaults(run=_bench)

    for module in ("cli_train", "cli_evaluate"):  # they import this one
        importlib.import_module(f"fewshot_engine.{module}").add_parsers(commands)
    return parser


def _add_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level", default="leaf", help="which folders are the classes: leaf (the default), top or 1, 2…"
    )


def _add_encoder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="fast", metavar="fast|NAME|CKPT", help=f"fast is {DEFAULT_ENCODER}")
    parser.add_argument("--cache-dir", type=Path, default=default_cache_dir(), help="where exported encoders are kept")
    parser.add_argument("--device", help="cpu or cuda; a GPU is taken where there is one")
    parser.add_argument("--json", action="store_true", help="accepted everywhere; the output is JSON in any case")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def default_cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewshot-studio"


def _embed(options: argparse.Namespace) -> None:
    images = from_folder(options.folder, options.level)
    encoder = _encoder(options)
    started = time.monotonic()
    embeddings, kept, refused = _embeddings(list(map(Path, images.paths)), encoder)
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
    encoder = _encoder(options)
    examples, kept, _ = _embeddings(list(map(Path, support.paths)), encoder)
    embeddings, answered, refused = _embeddings(queries, encoder)
    centre = mean_embedding(embeddings) if options.mode == "pool" and len(embeddings) else None
    classes, labels = _classes_left(support, kept)
    model = fit(examples, labels, len(classes), centre=centre)
    answers = classify(model, embeddings, top_k=options.top_k)
    for row, index in enumerate(answered):
        _print({"path": str(queries[index]), **_answer(answers, row, classes, reject=options.reject)})
    for refusal in refused:
        _print({**refusal, "label": None, "verdict": "refused"})
    _say_expected(model)


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


def _bench(options: argparse.Namespace) -> None:
    encoder = _encoder(options)
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_photos(Path(folder), options.photos)
        _print(measure_embedding(encoder, paths))


def draw_photos(folder: Path, count: int, *, side: int = 224) -> list[Path]:
    """JPEG files of smooth noise, about as costly to decode as photos of that size."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
        paths.append(folder / f"{number:05}.jpg")
        image.save(paths[-1], quality=90)
    return paths


def measure_embedding(encoder: Encoder, paths: list[Path]) -> dict[str, Any]:
    """Photos a second from files, beside the forward pass alone: with as many threads, from memory."""
    workers = os.cpu_count() or 1
    batch = np.zeros((encoder.batch_size, *encoder.input_shape), dtype=np.uint8)
    batches = [batch] * max(1, len(paths) // len(batch))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(encoder.encode, batches[:workers]))  # the first passes allocate
        bare = len(batches) * len(batch) / _seconds(lambda: list(pool.map(encoder.encode, batches)))
    from_files = len(paths) / _seconds(lambda: list(embed_files(paths, encoder, workers=workers)))
    return {
        "encoder": encoder.name,
        "photos": len(paths),
        "photos_per_s": round(from_files, 1),
        "bare_forward_per_s": round(bare, 1),
        "ratio": round(from_files / bare, 3),
    }


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _encoder(options: argparse.Namespace) -> Encoder:
    # One thread for each forward pass, and a worker for each core: see `embed_files`.
    name = ENCODERS.get(options.encoder, options.encoder)
    return load_encoder(name, cache_dir=options.cache_dir, threads=1, device=options.device)


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
