"""Episodes a second of *adapt* and *full* on this machine, as JSON: `python tests/bench/bench_train.py`.

`cpu_s` beside `whole_run_s` says whether the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np

from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.training import Evaluated, Finished, Step, meta_train


def measure_adapt(*, dim: int, episodes_per_step: int) -> dict[str, object]:
    """1,000 episodes (5-way 5-shot 15-query) on the embeddings of 60 classes of 20 photos, everything included."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 20)
    x = rng.standard_normal((1200, dim)) + rng.standard_normal((60, dim))[labels]
    data = TrainData(tuple(map(str, range(60))), labels, embeddings=x.astype(np.float32))
    config = TrainConfig(kind="adapt", learning_rate=1e-4, episodes_per_step=episodes_per_step)
    return {"what": "adapt", "dim": dim, "episodes_per_step": episodes_per_step, **_run(config, data, None)}


def measure_full(*, image_size: int, threads: int | None) -> dict[str, object]:
    """20 episodes of Conv-4 on pixels that are already there."""
    labels = np.repeat(np.arange(20), 20)
    pixels = np.random.default_rng(0).integers(0, 255, (400, image_size, image_size, 3), dtype=np.uint8)
    data = TrainData(tuple(map(str, range(20))), labels, pixels=pixels)
    config = TrainConfig(
        kind="full", backbone="conv4", image_size=image_size, epochs=1, episodes_per_epoch=20, eval_episodes=20
    )
    return {"what": "full conv4", "image_size": image_size, **_run(config, data, threads)}


def _run(config: TrainConfig, data: TrainData, threads: int | None) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        started, cpu = time.perf_counter(), time.process_time()
        evaluated, rates = [], []
        training = None
        for report in meta_train(config, data, checkpoint=Path(folder) / "run.safetensors", threads=threads):
            if training is None:
                training = time.perf_counter()
            if isinstance(report, Evaluated):
                evaluated.append(report)
            elif isinstance(report, Step):
                rates.append(report.episodes_per_s)
            if isinstance(report, Finished):
                break
        assert training is not None
        now = time.perf_counter()
    return {
        "episodes": config.total_episodes,
        "way_shot_query": list(EpisodeConfig().__dict__.values()),
        "evaluations": len(evaluated),
        "whole_run_s": round(now - started, 2),
        "cpu_s": round(time.process_time() - cpu, 2),
        "episodes_per_s": round(median(rates), 1),
        "episodes_per_s_with_evaluations": round(config.total_episodes / (now - training), 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, help="of torch, for full")
    options = parser.parse_args()
    for dim in (1280, 3840):
        for episodes_per_step in (1, 4):
            print(json.dumps(measure_adapt(dim=dim, episodes_per_step=episodes_per_step)), flush=True)
    for image_size in (28, 84):
        print(json.dumps(measure_full(image_size=image_size, threads=options.threads)), flush=True)
