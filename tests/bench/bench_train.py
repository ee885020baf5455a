"""Episodes a second of *adapt* and *full* on this machine, as JSON: `python -m tests.bench.bench_train`.

`cpu_s` beside `whole_run_s` says whether the machine was busy with something else. *Full* is measured beside its peer,
the loop of easyfsl's tutorial with the same network on the same drawings; `--omniglot` takes real ones.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import cast
from zipfile import ZipFile

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.datasets import LabelledImages, TrainData, from_folder
from fewshot_engine.pixel_cache import build_pixel_cache, read_pixel_cache
from fewshot_engine.reports import Evaluated, Finished, Step
from fewshot_engine.training import meta_train

SIDE = 28  # pixels, of the drawings
WARM_UP = 5  # episodes of the peer that do not count


def measure_adapt(*, dim: int, episodes_per_step: int) -> dict[str, object]:
    """1,000 episodes (5-way 5-shot 15-query) on the embeddings of 60 classes of 20 photos, everything included."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 20)
    x = rng.standard_normal((1200, dim)) + rng.standard_normal((60, dim))[labels]
    data = TrainData(tuple(map(str, range(60))), labels, embeddings=x.astype(np.float32))
    config = TrainConfig(kind="adapt", epochs=5, episodes_per_step=episodes_per_step)
    return {"what": "adapt", "dim": dim, "episodes_per_step": episodes_per_step, **_run(config, data, None)}


def measure_full(*, archive: Path | None, threads: int) -> Iterator[dict[str, object]]:
    """Conv-4 on drawings of 28 px, 5-way 5-shot 15-query: the engine's loop, then easyfsl's."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if archive is None:
            _draw(root)
        else:
            ZipFile(archive).extractall(root)
        images = from_folder(root)
        began = time.perf_counter()
        for _ in build_pixel_cache(images.paths, SIDE, root / "pixels.npy", decode_workers=threads):
            pass
        decoding = round(time.perf_counter() - began, 2)
        pixels = np.array(read_pixel_cache(root / "pixels.npy", images.paths, SIDE).pixels)
        data = TrainData(images.classes, images.labels, images.groups, pixels=pixels)
        config = TrainConfig(
            kind="full", backbone="conv4", image_size=SIDE, epochs=1, episodes_per_epoch=80, eval_episodes=20
        )
        ours = _run(config, data, threads)
        yield {"what": "full conv4", "image_size": SIDE, "first_decoding_s": decoding, **ours}
        for workers in range(threads + 1):
            rate = _easyfsl(images, workers=workers, threads=threads)
            ratio = round(cast(float, ours["episodes_per_s"]) / rate, 2)
            yield {"what": "easyfsl conv4", "workers": workers, "episodes_per_s": rate, "engine_times_faster": ratio}


def _easyfsl(images: LabelledImages, *, workers: int, threads: int, seconds: float = 15) -> float:
    """Episodes a second; its own loop, with the same network, of pictures that are made smaller and nothing else."""
    Sampler.__init__ = lambda self, data_source=None: None  # type: ignore[method-assign]  # torch 2.11 takes no argument
    from easyfsl.datasets import EasySet
    from easyfsl.methods import PrototypicalNetworks
    from easyfsl.samplers import TaskSampler

    torch.set_num_threads(threads)
    folders = sorted({str(Path(path).parent) for path in images.paths})
    with tempfile.TemporaryDirectory() as name:
        specs = Path(name) / "specs.json"
        specs.write_text(json.dumps({"class_names": folders, "class_roots": folders}))
        smaller = transforms.Compose([transforms.Resize((SIDE, SIDE)), transforms.ToTensor()])
        dataset = EasySet(specs, image_size=SIDE, transform=smaller)
    sampler = TaskSampler(dataset, n_way=5, n_shot=5, n_query=15, n_tasks=100_000)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=sampler.episodic_collate_fn)
    model = PrototypicalNetworks(get_backbone("conv4").build(SIDE))
    model.train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=5e-4)
    criterion = torch.nn.CrossEntropyLoss()
    began, done = 0.0, -WARM_UP
    for support, support_labels, query, query_labels, _ in loader:
        optimiser.zero_grad()
        model.process_support_set(support, support_labels)
        loss = criterion(model(query), query_labels)
        loss.backward()
        optimiser.step()
        done += 1
        if done == 0:
            began = time.perf_counter()
        elif done > 0 and time.perf_counter() - began > seconds:
            break
    return round(done / (time.perf_counter() - began), 1)


def _draw(root: Path) -> None:
    """40 characters of 20 drawings, 105 px, black on white, for machines without omniglot."""
    random = np.random.default_rng(0)
    for character in range(40):
        folder = root / "characters" / f"{character:02d}"
        folder.mkdir(parents=True)
        strokes = random.integers(15, 90, (4, 4))
        for drawing in range(20):
            picture = Image.new("L", (105, 105), 255)
            for stroke in strokes + random.integers(-6, 7, strokes.shape):
                ImageDraw.Draw(picture).line([tuple(stroke[:2]), tuple(stroke[2:])], fill=0, width=3)
            picture.save(folder / f"{drawing:02d}.png")


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
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, for full (all cores)")
    parser.add_argument("--omniglot", type=Path, metavar="ZIP", help="images_background_small1.zip; else made here")
    options = parser.parse_args()
    for dim in (1280, 3840):
        for episodes_per_step in (1, 4):
            print(json.dumps(measure_adapt(dim=dim, episodes_per_step=episodes_per_step)), flush=True)
    for figures in measure_full(archive=options.omniglot, threads=options.threads):
        print(json.dumps(figures), flush=True)
