"""What *adapt* gains on new classes of the kind it was adapted to, and loses elsewhere, against its frozen encoder.

`python -m tests.bench.bench_adapt [--encoder NAME] [--to FOLDER]` prints a JSON object for each set, shot and rule. The
photos are those of ../shared/data: of grocery's three folders two are adapted to, the third is new; clothing is
elsewhere. 600 episodes, 5 ways, 10 queries a class, the same for both encoders: gains are paired. How familiar photos
are is asked of each episode's examples alone, as a label set would.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import EpisodePlan, LabelledImages, TrainData, from_folder
from fewshot_engine.encoder import embed_files, load_encoder
from fewshot_engine.episodes import Episodes, EpisodeSampler
from fewshot_engine.prototypes import l2_normalise
from fewshot_engine.recipes import Recipe, load_recipe
from fewshot_engine.reports import Finished, Step
from fewshot_engine.ridge import episode_cosines
from fewshot_engine.training import meta_train
from fewshot_engine.weights import default_cache_dir

DATA = Path(__file__).parents[2].parent / "shared" / "data"
FOLDERS = ("Fruit", "Packages", "Vegetables")
WAY, SHOTS, QUERY, EPISODES = 5, (1, 5), 10, 600
WANTED = {"Vegetables": {1: 5.0, 5: 3.5}, "clothing": {1: -0.5, 5: -0.5}}  # points over the frozen encoder's
AT_ONCE = 25  # episodes
Vectors = NDArray[np.float32]


def embedded(folder: Path, encoder_name: str) -> tuple[LabelledImages, Vectors]:
    """All photos of a folder, embedded once for each encoder and kept in the cache."""
    images = from_folder(folder, "leaf")
    encoder = load_encoder(encoder_name, cache_dir=default_cache_dir(), threads=1, device="cpu")
    key = hashlib.sha256(repr((encoder.name, encoder.squares, images.paths)).encode()).hexdigest()[:16]
    kept = default_cache_dir() / "bench" / f"{folder.name}-{key}.npy"
    if not kept.exists():
        rows = [done.embedding for done in embed_files(map(Path, images.paths), encoder, workers=os.cpu_count() or 1)]
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.save(kept, np.stack(rows))
    return images, np.load(kept)


def adapted_to(images: LabelledImages, embeddings: Vectors, chosen: NDArray[np.bool_], name: str) -> Recipe:
    """The recipe of a run with default settings on the chosen photos, which are all that it sees."""
    classes, labels = np.unique(images.labels[chosen], return_inverse=True)
    data = TrainData(
        tuple(images.classes[index] for index in classes),
        labels.astype(np.int64),
        None if images.groups is None else images.groups[chosen],
        embeddings[chosen],
    )
    started, rates = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "run.safetensors"
        for report in meta_train(TrainConfig(kind="adapt", backbone=name), data, checkpoint=checkpoint):
            if isinstance(report, Step):
                rates.append(report.episodes_per_s)
            elif isinstance(report, Finished):
                recipe = load_recipe(report.model)
                size = sum(file.stat().st_size for file in report.model.iterdir())
    told = {name: recipe.card[name] for name in ("shrinkage", "damping", "share", "familiar_from", "best_at")}
    say(
        what="adapting",
        classes=len(classes),
        photos=int(chosen.sum()),
        dim=embeddings.shape[1],
        whole_run_s=round(time.perf_counter() - started, 2),
        episodes_per_s=round(float(np.median(rates))),
        model_mb=round(size / 1e6, 1),
        **told,
    )
    return recipe


def compare(name: str, recipe: Recipe, embeddings: Vectors, labels: NDArray[np.int64]) -> None:
    """Frozen and adapted on the same episodes, by the mean of each class's examples and by the product's rule."""
    dim = embeddings.shape[1]
    halves = recipe.apply(embeddings, familiarity=0.5 / recipe.share)  # of equal weight
    frozen, adapted = (shortened(half) for half in (halves[:, :dim], halves[:, dim:]))
    for shot in SHOTS:
        generator = torch.Generator().manual_seed(0)
        drawn = EpisodeSampler(labels, episode=EpisodePlan(WAY, shot, QUERY), generator=generator).sample(EPISODES)
        weights = np.array([recipe.familiarity(embeddings[rows.flatten()]) for rows in drawn.support.numpy()])
        weights *= recipe.share
        for rule, cosines in (("class means", mean_cosines), ("ridge", episode_cosines)):
            before = accuracies(frozen, adapted, np.zeros(EPISODES), drawn, cosines)
            after = accuracies(frozen, adapted, weights, drawn, cosines)
            gain = 100 * (after - before)
            say(
                what=name,
                rule=rule,
                shot=shot,
                frozen=round(100 * before.mean(), 1),
                adapted=round(100 * after.mean(), 1),
                gain=round(gain.mean(), 2),
                ci95=round(1.96 * gain.std(ddof=1) / EPISODES**0.5, 2),
                wanted=WANTED.get(name, {}).get(shot),
                weight_of_adapted=round(weights.mean(), 2),
            )


def shortened(rows: Vectors) -> Vectors:
    """(n, dim) -> (n, k <= n) of length 1, with the same cosines: so that an episode is quickly gathered."""
    unit = l2_normalise(rows.astype(np.float64))
    values, vectors = np.linalg.eigh(unit @ unit.T)
    return (vectors * np.sqrt(np.maximum(values, 0))).astype(np.float32)


def accuracies(
    frozen: Vectors, adapted: Vectors, weights: NDArray[np.float64], drawn: Episodes, cosines
) -> NDArray[np.float64]:
    """(episodes,): each episode's two halves weighted as its examples say."""
    results = []
    for start in range(0, len(drawn), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        support, query = drawn.support[part].numpy(), drawn.query[part].flatten(1).numpy()
        weight = np.float32(weights[part])

        def seen(rows, weight=weight):
            each = weight.reshape(-1, *[1] * rows.ndim)
            return np.concatenate([np.sqrt(1 - each) * frozen[rows], np.sqrt(each) * adapted[rows]], axis=-1)

        right = cosines(seen(support), seen(query)).argmax(axis=2) == np.repeat(np.arange(WAY), QUERY)
        results.append(right.mean(axis=1))
    return np.concatenate(results)


def mean_cosines(support: Vectors, query: Vectors) -> Vectors:
    """(b, way, shot, dim), (b, q, dim) -> (b, q, way), to the mean of each class (Snell et al. 2017)."""
    return query @ l2_normalise(support.mean(axis=2)).swapaxes(1, 2)


def say(**told: object) -> None:
    print(json.dumps(told), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", default="accurate")
    parser.add_argument("--to", choices=FOLDERS, default="Vegetables", help="the new classes")
    options = parser.parse_args()
    if not DATA.is_dir():
        say(what="adapt", skipped=f"{DATA} is not there")
        return
    torch.set_num_threads(1)
    grocery, embeddings = embedded(DATA / "grocery", options.encoder)
    folder_of = np.array([name.split("/")[0] for name in grocery.classes])[grocery.labels]
    new = folder_of == options.to
    recipe = adapted_to(grocery, embeddings, ~new, options.encoder)
    compare(options.to, recipe, embeddings[new], grocery.labels[new])
    clothing, elsewhere = embedded(DATA / "clothing", options.encoder)
    compare("clothing", recipe, elsewhere, clothing.labels)


if __name__ == "__main__":
    main()
