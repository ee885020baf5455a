import numpy as np
import pytest
import torch

from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import DataError
from fewshot_engine.evaluation import Score, confusion, episode_accuracies, evaluate, quality


def clouds(n_classes=8, photos=12, dim=16, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    centres = rng.standard_normal((n_classes, dim))
    noise = spread * rng.standard_normal((len(labels), dim))
    return (centres[labels] + noise).astype(np.float32), labels


def slow_accuracies(embeddings, labels, plan, episodes, seed):
    """Loops and the definition of the cosine."""
    sampler = EpisodeSampler(labels, episode=plan, generator=torch.Generator().manual_seed(seed))
    drawn = sampler.sample(episodes)
    unit = [row / np.linalg.norm(row) for row in embeddings]
    accuracies = []
    for support, query in zip(drawn.support.tolist(), drawn.query.tolist(), strict=True):
        prototypes = [np.mean([unit[i] for i in photos], axis=0) for photos in support]
        right = 0
        for way, photos in enumerate(query):
            for i in photos:
                cosines = [unit[i] @ p / np.linalg.norm(p) for p in prototypes]
                right += int(np.argmax(cosines) == way)
        accuracies.append(right / (plan.way * plan.query))
    return np.array(accuracies)


def test_accuracies_equal_the_slow_reference():
    embeddings, labels = clouds(spread=1.5)
    plan = EpisodePlan(5, 3, 6)
    fast = episode_accuracies(embeddings, labels, plan, episodes=40, seed=3)
    assert fast == pytest.approx(slow_accuracies(embeddings, labels, plan, 40, 3))


def test_interval_by_hand():
    score = Score.of(np.array([0.5, 0.7, 0.9, 0.7]), EpisodePlan(5, 1, 15))
    assert score.accuracy == pytest.approx(0.7)
    assert score.ci95 == pytest.approx(1.96 * 0.1632993 / 2)  # std of (-.2, 0, .2, 0) over 3, root of 4 episodes


def test_separate_classes_are_always_right_and_length_does_not_matter():
    embeddings, labels = clouds(spread=0.01)
    lengths = np.random.default_rng(1).uniform(0.1, 9, size=(len(labels), 1)).astype(np.float32)
    score = evaluate(embeddings * lengths, labels, way=5, shot=1, query=5, episodes=50)
    assert (score.accuracy, score.ci95) == (1.0, 0.0)


def test_noise_is_at_chance():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(20), 20)
    score = evaluate(rng.standard_normal((400, 8)).astype(np.float32), labels, way=5, shot=5, query=10, episodes=400)
    assert abs(score.accuracy - 0.2) < 0.02


def test_same_seed_same_score():
    embeddings, labels = clouds()
    scores = [evaluate(embeddings, labels, way=5, shot=1, query=5, episodes=30, seed=seed) for seed in (1, 1, 2)]
    assert scores[0] == scores[1] != scores[2]


def test_confusion_counts_every_query():
    embeddings = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1], [1, 0.01], [1, 0.05]], dtype=np.float32)
    counts = confusion(embeddings, np.array([0, 0, 1, 1, 2, 2]), n_classes=3, way=3, shot=1, query=1, episodes=60)
    assert counts.sum(axis=1).tolist() == [60, 60, 60]
    assert counts[1].tolist() == [0, 60, 0]  # far from the others
    assert counts[0, 1] == counts[2, 1] == 0
    assert counts[0, 2] > 0


def test_quality_by_hand():
    embeddings = np.array([[1, 0], [0, 2], [0, -1], [0, -3]], dtype=np.float32)
    found = quality(embeddings, np.array([0, 0, 1, 1]))
    half = 2**-0.5  # class 0's mean points to 45°: both its photos are 1 - cos 45° away; class 1 has no spread
    assert found.intra_class == pytest.approx((1 - half) / 2)
    assert found.inter_class == pytest.approx(1 + half)
    assert found.ratio == pytest.approx((1 - half) / 2 / (1 + half))
    with pytest.raises(DataError, match="need 2 classes; there are 1"):
        quality(embeddings, np.zeros(4, dtype=np.int64))
