import random

import numpy as np
import pytest
import torch

from fewshot_engine.config import EpisodeConfig
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import ConfigError, DataError

SHAPE = EpisodeConfig(way=3, shot=2, query=4)


def sampler(labels, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return EpisodeSampler(labels, episode=options.pop("episode", SHAPE), generator=generator, **options)


def slow_episode(labels, groups, episode, rng):
    """The obvious way: classes, then groups of each, then a photo of each group."""
    classes = rng.sample(sorted(set(labels)), episode.way)
    support, query = [], []
    for name in classes:
        of_class = sorted({groups[i] for i, label in enumerate(labels) if label == name})
        chosen = rng.sample(of_class, episode.shot + episode.query)
        photos = [rng.choice([i for i, group in enumerate(groups) if group == g and labels[i] == name]) for g in chosen]
        support.append(photos[: episode.shot])
        query.append(photos[episode.shot :])
    return support, query


def check(episodes, labels, groups):
    for b in range(len(episodes)):
        photos = episodes.indices()[b]
        assert len(set(episodes.classes[b].tolist())) == photos.shape[0]
        for way, name in enumerate(episodes.classes[b].tolist()):
            assert (labels[photos[way].numpy()] == name).all()
        of_groups = groups[photos.flatten().numpy()]
        assert len(set(of_groups.tolist())) == photos.numel()  # no photo, and no group, twice in an episode


def test_support_and_query_are_disjoint_and_of_their_class():
    labels = np.random.default_rng(0).integers(0, 6, size=120)
    drawn = sampler(labels).sample(200)
    assert drawn.support.shape == (200, 3, 2)
    assert drawn.query.shape == (200, 3, 4)
    check(drawn, labels, np.arange(120))


def test_no_group_has_two_photos_in_an_episode():
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(5), 40)
    groups = labels * 100 + rng.integers(0, 12, size=200)
    groups[0] = groups[60]  # a burst over two classes
    drawn = sampler(labels, groups=groups).sample(200)
    check(drawn, labels, groups)


def test_photos_are_drawn_as_often_as_by_the_slow_reference():
    labels = [0] * 8 + [1] * 6 + [2] * 7 + [3] * 10
    groups = [0, 0, 0, *range(3, 31)]  # a burst of three counts as one photo
    rng, counts = random.Random(0), np.zeros((2, 31))
    for _ in range(6000):
        support, query = slow_episode(labels, groups, EpisodeConfig(3, 2, 4), rng)
        for photos in support + query:
            np.add.at(counts[0], photos, 1)
    drawn = sampler(np.array(labels), groups=np.array(groups), seed=3).sample(6000)
    np.add.at(counts[1], drawn.indices().flatten().numpy(), 1)
    assert np.abs(counts[0] - counts[1]).max() < 6 * np.sqrt(counts.max())


def test_small_classes_are_not_drawn():
    labels = np.array([0] * 6 + [1] * 5 + [2] * 6 + [3] * 6)
    assert set(sampler(labels).sample(100).classes.flatten().tolist()) == {0, 2, 3}
    with pytest.raises(DataError, match=r"4-way needs 4 classes with 6 photos \(2 support, 4 query\); there are 3"):
        sampler(labels, episode=EpisodeConfig(4, 2, 4))


def test_weights_make_classes_more_frequent():
    labels = np.repeat(np.arange(6), 6)
    drawn = sampler(labels, weights=np.array([9.0, 1, 1, 1, 1, 1])).sample(2000)
    share = np.bincount(drawn.classes.flatten().numpy(), minlength=6) / 2000
    assert share[0] > 0.9
    assert share[1:].max() < 0.5
    with pytest.raises(ConfigError, match="above 0 and finite"):
        sampler(labels, weights=np.zeros(6))


def test_negative_labels_are_left_alone():
    labels = np.repeat(np.arange(4), 6)
    labels[labels == 1] = -1
    assert 1 not in sampler(labels).sample(50).classes


def test_the_same_state_gives_the_same_episodes():
    labels = np.repeat(np.arange(6), 10)
    first = sampler(labels, seed=5)
    first.sample(7)
    state = first.state()
    expected = first.sample(9)
    second = sampler(labels, seed=99)
    second.restore(state)
    assert torch.equal(second.sample(9).indices(), expected.indices())


def test_smaller_episodes_come_from_the_same_sampler():
    labels = np.repeat(np.arange(6), 20)
    drawn = sampler(labels).sample(50, way=2, shot=1)
    assert drawn.support.shape == (50, 2, 1)
    assert drawn.query.shape == (50, 2, 4)
    check(drawn, labels, np.arange(120))
    with pytest.raises(ConfigError, match="4-way 1-shot of a sampler made for up to 3-way 2-shot"):
        sampler(labels).sample(1, way=4, shot=1)
