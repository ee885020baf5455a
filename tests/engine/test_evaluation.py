import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.evaluation import (
    Protocol,
    Score,
    episode_accuracies,
    evaluate,
    quality,
    report,
    shared_out,
)
from fewshot_engine.inference import classify, classify_batch, fit, mean_embedding, neighbours_in
from fewshot_engine.prototypes import Rule


def clouds(n_classes=8, photos=12, dim=16, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    centres = rng.standard_normal((n_classes, dim))
    noise = spread * rng.standard_normal((len(labels), dim))
    return (centres[labels] + noise).astype(np.float32), labels


def slow_accuracies(embeddings, labels, plan, episodes, seed):
    """Each episode as a label set of its own, answered by the product."""
    sampler = EpisodeSampler(labels, episode=plan, generator=torch.Generator().manual_seed(seed))
    drawn = sampler.sample(episodes)
    accuracies = []
    for support, query in zip(drawn.support.numpy(), drawn.query.numpy(), strict=True):
        model = fit(embeddings[support.ravel()], np.repeat(np.arange(plan.way), plan.shot), plan.way)
        answers = classify(model, embeddings[query.ravel()]).labels[:, 0]
        accuracies.append(np.mean(answers == np.repeat(np.arange(plan.way), plan.query)))
    return np.array(accuracies)


def test_accuracies_are_those_of_the_products_own_answers():
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


@pytest.mark.parametrize("mode", ["inductive", "pool", "batch"])
def test_a_report_is_the_products_answers_counted(mode):
    embeddings, labels = clouds(spread=1.5)
    protocol = Protocol(3, 2, 4, episodes=20, seed=5, mode=mode)
    found = report(embeddings, labels, protocol, n_classes=8)
    drawn = EpisodeSampler(labels, episode=protocol, generator=torch.Generator().manual_seed(5)).sample(20)
    truth, pooled = np.repeat(np.arange(3), 4), mode != "inductive"
    centre = mean_embedding(embeddings) if pooled else None
    accuracies, confusion, confidences, hits = [], np.zeros((8, 8)), [], []
    for classes, support, query in zip(drawn.classes.numpy(), drawn.support.numpy(), drawn.query.numpy(), strict=True):
        examples = embeddings[support.ravel()]
        near = neighbours_in(embeddings, examples, centre) if pooled else None
        model = fit(examples, np.repeat(np.arange(3), 2), 3, centre=centre, likeness=near)
        queries = embeddings[query.ravel()]
        answers = classify_batch(model, queries)[0] if mode == "batch" else classify(model, queries)
        best = answers.labels[:, 0]
        accuracies.append(np.mean(best == truth))
        for is_class, taken_for in zip(classes[truth], classes[best], strict=True):
            confusion[is_class, taken_for] += 1
        confidences += list(answers.confidences[:, 0])
        hits += list(best == truth)
    assert found.score == Score.of(np.array(accuracies), EpisodePlan(3, 2, 4))
    np.testing.assert_array_equal(found.confusion, confusion)
    np.testing.assert_allclose(found.per_class, confusion.diagonal() / confusion.sum(axis=1))
    assert found.calibration_error == pytest.approx(slow_calibration_error(confidences, hits), abs=1e-3)
    if mode == "inductive":
        assert found.inductive is found.changed is None
    else:
        assert (
            found.inductive
            == report(embeddings, labels, replace(protocol, mode="inductive"), n_classes=8).score.accuracy
        )
    assert (found.changed is not None) == (mode == "batch")


def slow_calibration_error(confidences, hits, bins=15):
    """Mean over fifteen equal bins of |confidence - hit rate|, by how many answers are in each (Guo et al. 2017)."""
    in_bin = [[] for _ in range(bins)]
    for confidence, hit in zip(confidences, hits, strict=True):
        in_bin[min(int(confidence * bins), bins - 1)].append((confidence, hit))
    gaps = [
        len(pairs) * abs(np.mean([c for c, _ in pairs]) - np.mean([h for _, h in pairs])) for pairs in in_bin if pairs
    ]
    return sum(gaps) / len(hits)


def slow_auroc(of_strangers, of_known):
    """The share of pairs in which the stranger has the higher score."""
    return np.mean([(s > k) + 0.5 * (s == k) for s in of_strangers for k in of_known])


def test_strangers_are_query_images_of_classes_without_examples():
    embeddings, labels = clouds(spread=1.5)
    found = report(embeddings, labels, Protocol(3, 2, 4, episodes=15, seed=5), n_classes=8)
    plan = EpisodePlan(6, 2, 4)
    drawn = EpisodeSampler(labels, episode=plan, generator=torch.Generator().manual_seed(5)).sample(15)
    aurocs = []
    for support, query in zip(drawn.support.numpy(), drawn.query.numpy(), strict=True):
        model = fit(embeddings[support[:3].ravel()], np.repeat(np.arange(3), 2), 3)
        scores = classify(model, embeddings[query.ravel()]).stranger
        aurocs.append(slow_auroc(scores[12:], scores[:12]))
    assert found.stranger_auroc == pytest.approx(np.mean(aurocs), abs=1e-4)
    assert found.stranger_auroc_ci95 == pytest.approx(1.96 * np.std(aurocs, ddof=1) / 15**0.5, abs=1e-4)
    assert report(embeddings, labels, Protocol(5, 2, 4, episodes=2), n_classes=8).stranger_auroc is None  # of 8 classes


def test_class_means_are_the_plain_cosine_classifier():
    embeddings, labels = clouds(spread=1.5)
    found = report(embeddings, labels, Protocol(3, 2, 4, episodes=10, seed=2), n_classes=8)
    drawn = EpisodeSampler(labels, episode=EpisodePlan(3, 2, 4), generator=torch.Generator().manual_seed(2)).sample(10)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    hits = []
    for support, query in zip(drawn.support.tolist(), drawn.query.tolist(), strict=True):
        means = [np.mean([unit[i] for i in photos], axis=0) for photos in support]
        hits += [
            np.argmax([unit[i] @ m / np.linalg.norm(m) for m in means]) == way
            for way, photos in enumerate(query)
            for i in photos
        ]
    assert found.class_means == pytest.approx(np.mean(hits))


def test_imbalanced_queries_are_as_many_in_all_and_shared_out_unequally():
    embeddings, labels = clouds(photos=20)
    found = report(embeddings, labels, Protocol(4, 1, 5, episodes=30, mode="batch", imbalance=0.5), n_classes=8)
    assert found.confusion.sum() == 30 * 20
    equal = report(embeddings, labels, Protocol(4, 1, 5, episodes=30), n_classes=8)
    assert found.confusion.sum(axis=1).std() > equal.confusion.sum(axis=1).std()
    assert found.imbalance == 0.5


@pytest.mark.parametrize(
    ("shares", "total", "most", "expected"),
    [
        ([0.5, 0.3, 0.2], 10, 10, [5, 3, 2]),
        ([0.55, 0.25, 0.2], 10, 10, [6, 2, 2]),  # 5.5, 2.5, 2: the first of equal remainders
        ([0.9, 0.05, 0.05], 10, 4, [4, 3, 3]),  # what the first cannot give, the others do
        ([0.6, 0.39, 0.01], 12, 5, [5, 5, 2]),
        ([1.0, 0.0, 0.0], 6, 2, [2, 2, 2]),
    ],
)
def test_shares_become_whole_numbers(shares, total, most, expected):
    assert shared_out(np.array(shares), total, most).tolist() == expected


def test_copies_of_photos_do_not_break_a_report():
    embeddings, labels = clouds()
    embeddings[labels == 0] = embeddings[0]
    embeddings[labels == 1] = 0
    assert np.isfinite(report(embeddings, labels, Protocol(5, 2, 4, episodes=5), n_classes=8).score.accuracy)
    everywhere_the_same = report(np.ones_like(embeddings), labels, Protocol(5, 2, 4, episodes=5), n_classes=8)
    json.dumps(everywhere_the_same.to_dict(list("abcdefgh")), allow_nan=False)


def test_a_report_for_json_names_the_classes():
    embeddings, labels = clouds(n_classes=6, spread=2.0)
    found = report(embeddings, labels, Protocol(3, 1, 4, episodes=20), n_classes=7)  # one class has no photos
    names = list("abcdefg")
    said = json.loads(json.dumps(found.to_dict(names, worst=3)))
    assert {"accuracy", "ci95", "way", "shot", "episodes", "intra_class", "inter_class", "chance"} <= said.keys()
    assert sorted(said["per_class"]) == names[:6]
    worst = said["confusions"][0]
    shares = found.confusion / np.maximum(found.confusion.sum(axis=1, keepdims=True), 1)
    np.fill_diagonal(shares, 0)
    assert worst["share"] == pytest.approx(shares.max(), abs=1e-4)
    assert len(said["confusions"]) == 3


@pytest.mark.parametrize(
    "options", [{"episodes": 1}, {"mode": "psychic"}, {"imbalance": 0}, {"imbalance": -1}, {"method": "none"}]
)
def test_a_protocol_checks_itself(options):
    with pytest.raises(ConfigError):
        Protocol(5, 1, 10, **options)


def test_quality_by_hand():
    embeddings = np.array([[1, 0], [0, 2], [0, -1], [0, -3]], dtype=np.float32)
    found = quality(embeddings, np.array([0, 0, 1, 1]))
    half = 2**-0.5  # class 0's mean points to 45°: both its photos are 1 - cos 45° away; class 1 has no spread
    assert found.intra_class == pytest.approx((1 - half) / 2)
    assert found.inter_class == pytest.approx(1 + half)
    assert found.ratio == pytest.approx((1 - half) / 2 / (1 + half))
    with pytest.raises(DataError, match="need 2 classes; there are 1"):
        quality(embeddings, np.zeros(4, dtype=np.int64))


def test_a_network_that_learned_from_pixels_is_answered_by_class_means():
    embeddings, labels = clouds(spread=1.5)
    means, plan = Rule.usual(is_full=True), EpisodePlan(3, 2, 4)
    fast = episode_accuracies(embeddings, labels, plan, episodes=20, seed=5, rule=means)
    protocol = Protocol(3, 2, 4, episodes=20, seed=5, rule=means)
    assert report(embeddings, labels, protocol, n_classes=8).score == Score.of(fast, plan)
    assert report(embeddings, labels, protocol, n_classes=8).class_means == pytest.approx(fast.mean())
    with pytest.raises(ConfigError, match="class means"):
        episode_accuracies(embeddings, labels, plan, episodes=20, seed=5, rule=Rule("euclidean"))
