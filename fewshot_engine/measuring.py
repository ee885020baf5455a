"""How fast this machine is: the figures of `python -m fewshot_engine bench`, and what the benchmarks build on."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fewshot_engine.encoder import Encoder, embed_files
from fewshot_engine.errors import ConfigError
from fewshot_engine.inference import classify, fit

WORKERS = os.cpu_count() or 1


def draw_photos(folder: Path, count: int, *, width: int = 300, height: int = 225) -> list[Path]:
    """JPEG files of smooth shapes under a little noise, with about the bytes, and so the decoding, of real photos."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        # One patch of noise repeated: drawing millions of numbers takes longer than what is measured.
        patch = rng.integers(0, 12, (min(height, 240), min(width, 240), 1), dtype=np.uint8)
        noise = np.tile(patch, (-(-height // len(patch)), -(-width // patch.shape[1]), 1))[:height, :width]
        paths.append(folder / f"{number:05}.jpg")
        Image.fromarray(np.clip(smooth.astype(np.int16) + noise, 0, 255).astype(np.uint8)).save(paths[-1], quality=90)
    return paths


def measure_embedding(encoder: Encoder, paths: list[Path], *, rounds: int = 1) -> dict[str, Any]:
    """Photos a second from files, and of the forward pass alone.

    Alone means from memory, with as many threads, the same views and the same batch. The two take turns, so that
    whatever else the machine does meets both; each figure is the median of the rounds.
    """
    batch = np.zeros((encoder.batch_size, *encoder.input_shape), dtype=np.uint8)
    batches = [batch] * max(WORKERS, len(paths) // len(batch))
    bare, files, ratios = [], [], []
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(encoder.encode, batches[:WORKERS]))  # the first passes allocate
        for _ in range(rounds):
            bare.append(len(batches) * len(batch) / seconds(lambda: list(pool.map(encoder.encode, batches))))
            files.append(len(paths) / seconds(lambda: list(embed_files(paths, encoder, workers=WORKERS))))
            ratios.append(files[-1] / bare[-1])
    return {
        "encoder": encoder.name,
        "photos": len(paths),
        "photos_per_s": round(median(files), 1),
        "bare_forward_per_s": round(median(bare), 1),
        "ratio": round(median(ratios), 3),
    }


def measure_classifying(encoder: Encoder, paths: list[Path], *, way: int = 5, shot: int = 5) -> dict[str, Any]:
    """From files to answers: the seconds until five labels of five examples can answer, then milliseconds a photo."""
    support, queries = paths[: way * shot], paths[way * shot :]
    if not queries:
        raise ConfigError(f"{len(paths)} photos leave none to sort: {way} labels of {shot} examples take {way * shot}")
    labels = np.repeat(np.arange(way), shot)
    started = time.perf_counter()
    examples = _embed(support, encoder)
    model = fit(examples, labels, way, likeness=encoder.likeness(examples))
    ready = time.perf_counter() - started
    alone = []
    for path in queries:
        begun = time.perf_counter()
        classify(model, _embed([path], encoder))
        alone.append(time.perf_counter() - begun)
    return {
        "encoder": encoder.name,
        "way": way,
        "shot": shot,
        "ready_s": round(ready, 3),
        "one_photo_ms": round(1000 * median(alone), 1),
        "one_photo_p95_ms": round(1000 * float(np.quantile(alone, 0.95)), 1),
    }


def measure_training(dim: int, *, episodes: int = 400) -> dict[str, Any]:
    """*Adapt* on made-up embeddings of 60 classes of 20 photos, 5-way 5-shot 15-query: episodes a second."""
    from fewshot_engine.config import TrainConfig
    from fewshot_engine.datasets import TrainData
    from fewshot_engine.reports import Step
    from fewshot_engine.training import meta_train

    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 20)
    embeddings = rng.standard_normal((1200, dim)) + rng.standard_normal((60, dim))[labels]
    data = TrainData(tuple(map(str, range(60))), labels, embeddings=embeddings.astype(np.float32))
    config = TrainConfig(kind="adapt", learning_rate=1e-4, epochs=1, episodes_per_epoch=episodes, eval_episodes=20)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        reports = list(meta_train(config, data, checkpoint=Path(folder) / "run.safetensors"))
    rates = [report.episodes_per_s for report in reports if isinstance(report, Step)]
    return {
        "kind": "adapt",
        "dim": dim,
        "episodes": episodes,
        "episodes_per_s": round(median(rates), 1),
        "whole_run_s": round(time.perf_counter() - started, 2),
    }


def _embed(paths: list[Path], encoder: Encoder) -> NDArray[np.float32]:
    done = embed_files(paths, encoder, workers=WORKERS)
    return np.stack([one.embedding for one in done if one.embedding is not None])


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
