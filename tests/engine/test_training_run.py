"""What a run learns from, step by step; `test_training` has whole runs."""

import numpy as np
import pytest
import torch

from fewshot_engine.config import Curriculum, EpisodeConfig, Stage, TrainConfig, Variation
from fewshot_engine.datasets import ClassSplit, TrainData
from fewshot_engine.exams import labels_of
from fewshot_engine.training_run import Run
from tests.engine.test_training import ADAPT, FULL, bars, nuisance_embeddings


def test_groups_over_two_classes_do_not_tear():
    data = nuisance_embeddings()
    groups = np.arange(len(data.labels))
    groups[:6] = groups[-1]  # six photos of the first class are near copies of one of the last
    run = Run(ADAPT, TrainData(data.classes, data.labels, groups, data.embeddings), torch.device("cpu"))
    kept = [labels_of(run.data, part) for part in (run.split.base, run.split.validation)]
    assert all(labels[-1] == -1 for labels in kept)
    base, validation = (set(groups[labels >= 0]) for labels in kept)
    assert not base & validation


def shapes_drawn(config, data):
    run = Run(config, data, torch.device("cpu"))
    shapes = []
    sample = run.sampler.sample

    def watched(count, **shape):
        shapes.append((shape["way"], shape["shot"]))
        return sample(count, **shape)

    run.sampler.sample = watched
    while not run.is_over:
        run.step()
    return shapes, run


def test_a_curriculum_goes_from_stage_to_stage_and_is_told():
    curriculum = Curriculum((Stage(0, 2, 4), Stage(0.5, 3, 1)))
    config = TrainConfig(**{**ADAPT.__dict__, "epochs": 1, "episodes_per_epoch": 10, "curriculum": curriculum})
    shapes, run = shapes_drawn(config, nuisance_embeddings())
    assert shapes == [(2, 4)] * 5 + [(3, 1)] * 5
    assert run.validation.plan.shot == 2  # the figure is of the episode that was asked for
    notes = run.started(resumed=False).notes
    assert "Curriculum, by share of the episodes: from 0% 2-way 4-shot, then from 50% 3-way 1-shot." in notes


def test_ways_and_shots_vary_within_their_ranges():
    values = {"epochs": 1, "episodes_per_epoch": 60, "vary": Variation((2, 4), (1, 3))}
    config = TrainConfig(**{**ADAPT.__dict__, **values})
    shapes, _ = shapes_drawn(config, nuisance_embeddings())
    assert {way for way, _ in shapes} == {2, 3, 4}
    assert {shot for _, shot in shapes} == {1, 2, 3}


def test_rotations_are_classes_of_base_alone():
    config = TrainConfig(**{**FULL.__dict__, "rotations_as_classes": True})
    data = bars()
    run = Run(config, data, torch.device("cpu"))
    base, n = set(run.split.base), len(data.classes)
    assert {int(name) % n for name in run.sampler.classes} == base
    assert len(run.sampler.classes) == 4 * len(base)
    drawn = run.sampler.sample(50).indices()
    assert set((drawn // len(data.labels)).flatten().tolist()) == {0, 1, 2, 3}
    assert int(run.validation.photos.max()) < len(data.labels)
    assert f"{len(base)} base classes, turned" in run.started(resumed=False).notes[-1]


def test_large_classes_come_more_often_where_size_counts():
    data = nuisance_embeddings(n_classes=6, photos=40)
    kept = np.concatenate([np.flatnonzero(data.labels == c)[: 40 if c == 0 else 10] for c in range(6)])
    split = ClassSplit((0, 1, 2, 3), (4, 5), 2)
    few = TrainData(data.classes, data.labels[kept], embeddings=data.embeddings[kept], split=split)
    values = {**ADAPT.__dict__, "episode": EpisodeConfig(2, 1, 2)}
    shares = []
    for weights in ("balanced", "size"):
        run = Run(TrainConfig(**{**values, "class_weights": weights}), few, torch.device("cpu"))
        shares.append(float((run.sampler.sample(2000).classes == 0).any(dim=1).float().mean()))
    assert shares[0] == pytest.approx(0.5, abs=0.05)
    assert shares[1] > 0.75
