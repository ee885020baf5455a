import numpy as np
import pytest

from fewshot_engine.errors import ConfigError, EmptyClassError
from fewshot_engine.prototypes import cosine_prototypes, cosine_similarity, l2_normalise
from fewshot_engine.transductive import alpha_tim, bd_cspn, soft_kmeans

METHODS = (
    soft_kmeans,
    lambda *task: soft_kmeans(*task, votes_for_itself=True, learns_shares=True, temperature=30),
    bd_cspn,
    alpha_tim,
)


def task(counts=(10, 10, 10), shot=3, *, dim=24, noise=1.0, seed=0):
    """`counts` query images of each class around its own direction; (queries, truth, support, labels, n_way)."""
    rng = np.random.default_rng(seed)
    n_way = len(counts)
    directions = rng.normal(size=(n_way, dim))
    labels, truth = np.repeat(np.arange(n_way), shot), np.repeat(np.arange(n_way), counts)

    def draw(which):
        return directions[which] + noise * rng.normal(size=(len(which), dim))

    return draw(truth), truth, draw(labels), labels, n_way


def unit(vector):
    return vector / np.linalg.norm(vector)


def slow_soft_kmeans(queries, support, labels, n_way, *, temperature, iterations, weight, own, shares, prior):
    queries, support = [unit(q) for q in queries], [unit(s) for s in support]
    belongs = None
    share = [1 / n_way] * n_way
    for step in range(iterations + 1):
        similarities = np.zeros((len(queries), n_way))
        for i, query in enumerate(queries):
            for k in range(n_way):
                total = sum((s for s, label in zip(support, labels, strict=True) if label == k), np.zeros(len(query)))
                for j, other in enumerate(queries):
                    if belongs is not None and (own or j != i):
                        total = total + weight * belongs[j][k] * other
                similarities[i, k] = query @ unit(total)
                if shares and step:
                    similarities[i, k] += np.log(share[k]) / temperature
        belongs = np.exp(temperature * similarities)
        belongs /= belongs.sum(axis=1, keepdims=True)
        share = (belongs.sum(axis=0) + prior) / (belongs.sum() + prior * n_way)
    return similarities


@pytest.mark.parametrize(("own", "shares"), [(False, False), (True, False), (True, True)])
def test_soft_kmeans_agrees_with_a_loop(own, shares):
    queries, _, support, labels, n_way = task((6, 2, 4), 2)
    options = {"temperature": 12.0, "iterations": 3}
    fast = soft_kmeans(
        queries, support, labels, n_way, query_weight=0.7, votes_for_itself=own, learns_shares=shares, **options
    )
    slow = slow_soft_kmeans(queries, support, labels, n_way, weight=0.7, own=own, shares=shares, prior=1.0, **options)
    np.testing.assert_allclose(fast, slow, atol=1e-9)


def test_soft_kmeans_by_hand():
    # Two classes on the axes; one query at 30 degrees. At once it belongs to class 0 by p, and its own vote is out.
    support, query = np.eye(2), np.array([[np.sqrt(3) / 2, 0.5]])
    np.testing.assert_allclose(soft_kmeans(query, support, np.array([0, 1]), 2), [[np.sqrt(3) / 2, 0.5]])
    p = 1 / (1 + np.exp(-2 * (np.sqrt(3) / 2 - 0.5)))
    found = soft_kmeans(
        query, support, np.array([0, 1]), 2, temperature=2, iterations=1, query_weight=1, votes_for_itself=True
    )
    first, second = np.array([1, 0]) + p * query[0], np.array([0, 1]) + (1 - p) * query[0]
    np.testing.assert_allclose(found, [[query[0] @ unit(first), query[0] @ unit(second)]])


def slow_bd_cspn(queries, support, labels, n_way, temperature=10):
    queries, support = l2_normalise(queries), l2_normalise(support)
    queries = queries + support.mean(axis=0) - queries.mean(axis=0)
    basic = [unit(support[labels == k].mean(axis=0)) for k in range(n_way)]
    rectified = np.zeros((n_way, support.shape[1]))
    for number, photo in enumerate([*support, *queries]):
        cosines = np.array([unit(photo) @ prototype for prototype in basic])
        joins = labels[number] if number < len(support) else cosines.argmax()
        rectified[joins] += np.exp(temperature * cosines[joins]) / np.exp(temperature * cosines).sum() * photo
    return np.array([[unit(query) @ unit(prototype) for prototype in rectified] for query in queries])


def test_bd_cspn_agrees_with_a_loop():
    queries, _, support, labels, n_way = task((6, 2, 4), 2)
    np.testing.assert_allclose(
        bd_cspn(queries, support, labels, n_way), slow_bd_cspn(queries, support, labels, n_way), atol=1e-9
    )


def test_bd_cspn_by_hand():
    # The queries' mean is the support's, so nothing shifts; each joins the axis it lies on, with one weight for all.
    support = np.eye(2)
    np.testing.assert_allclose(bd_cspn(support, support, np.array([0, 1]), 2), np.eye(2), atol=1e-12)


def alpha_tim_loss(weights, queries, support, labels, *, alpha, temperature):
    """The paper's loss, with weights (n_way, dim) in the space of the photos."""

    def probabilities(photos):
        logits = np.array([[-temperature / 2 * ((z - w) ** 2).sum() for w in weights] for z in photos])
        return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)

    def entropy(p):
        return (1 - (p**alpha).sum(axis=-1)) / (alpha - 1)

    of_support, of_queries = probabilities(support), probabilities(queries)
    cross_entropy = -np.log(of_support[np.arange(len(labels)), labels]).mean()
    return cross_entropy - entropy(of_queries.mean(axis=0)) + entropy(of_queries).mean()


def slow_alpha_tim(queries, support, labels, n_way, *, alpha, temperature, iterations):
    """Descent with gradients by central differences."""
    queries, support = l2_normalise(queries), l2_normalise(support)
    weights = np.stack([support[labels == k].mean(axis=0) for k in range(n_way)])
    velocity = np.zeros_like(weights)
    for _ in range(iterations):
        gradient = np.zeros_like(weights)
        for place in np.ndindex(weights.shape):
            step = np.zeros_like(weights)
            step[place] = 1e-5
            ends = [
                alpha_tim_loss(moved, queries, support, labels, alpha=alpha, temperature=temperature)
                for moved in (weights + step, weights - step)
            ]
            gradient[place] = (ends[0] - ends[1]) / 2e-5
        velocity = 0.9 * velocity - 0.3 / temperature * gradient
        weights = weights + velocity
    return np.array([[z @ w - w @ w / 2 for w in weights] for z in queries])


def test_alpha_tim_agrees_with_numerical_gradients_of_the_papers_loss():
    queries, _, support, labels, n_way = task((4, 1, 2), 2, dim=4)
    options = {"alpha": 3.0, "temperature": 8.0, "iterations": 4}
    np.testing.assert_allclose(
        alpha_tim(queries, support, labels, n_way, **options),
        slow_alpha_tim(queries, support, labels, n_way, **options),
        atol=1e-7,
    )


def test_alpha_tim_starts_at_the_prototypes():
    found = alpha_tim(np.array([[0.6, 0.8]]), np.eye(2), np.array([0, 1]), 2, iterations=0)
    np.testing.assert_allclose(found, [[0.1, 0.3]])  # z·w - |w|² / 2


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_support_does_not_matter(method):
    queries, _, support, labels, n_way = task((8, 3, 5), 3)
    order = np.random.default_rng(1).permutation(len(labels))
    np.testing.assert_allclose(
        method(queries, support, labels, n_way), method(queries, support[order], labels[order], n_way), atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_numbering_the_classes_otherwise_permutes_the_answers(method):
    queries, _, support, labels, n_way = task((8, 3, 5), 3)
    renamed = np.array([2, 0, 1])
    np.testing.assert_allclose(
        method(queries, support, renamed[labels], n_way)[:, renamed],
        method(queries, support, labels, n_way),
        atol=1e-9,
    )


@pytest.mark.parametrize("method", METHODS)
def test_lengths_of_embeddings_do_not_matter(method):
    queries, _, support, labels, n_way = task((8, 3, 5), 3)
    np.testing.assert_allclose(
        method(queries * 7, support * 0.1, labels, n_way), method(queries, support, labels, n_way), atol=1e-9
    )


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_helps_one_shot_on_average(method):
    gains = []
    for seed in range(40):
        queries, truth, support, labels, n_way = task((12, 12, 12), 1, noise=1.2, seed=seed)
        alone = cosine_similarity(queries, cosine_prototypes(support, labels, n_way)).argmax(axis=1)
        together = method(queries, support, labels, n_way).argmax(axis=1)
        gains.append((together == truth).mean() - (alone == truth).mean())
    assert np.mean(gains) > 0.02


def right(method, counts):
    """Mean accuracy on batches with `counts` query images of each class, three examples a class."""
    tasks = [task(counts, 3, noise=0.8, seed=seed) for seed in range(20)]
    return np.mean([(method(queries, *rest).argmax(axis=1) == truth).mean() for queries, truth, *rest in tasks])


def test_imbalanced_batches_are_not_forced_into_equal_parts():
    for method in METHODS:
        if method is not bd_cspn:
            assert right(method, (30, 3, 1)) > 0.9
            assert right(method, (20, 0, 0)) > 0.7  # one class alone; chance is 0.33


def test_the_shift_of_bd_cspn_presumes_balance():
    assert right(bd_cspn, (12, 12, 12)) > 0.9
    assert right(bd_cspn, (30, 3, 1)) < 0.85


@pytest.mark.parametrize("method", METHODS)
def test_no_query_and_one_query_and_zeros(method):
    _, _, support, labels, n_way = task()
    assert method(np.empty((0, 24)), support, labels, n_way).shape == (0, 3)
    for queries in (np.zeros((1, 24)), np.ones((3, 24))):
        assert np.isfinite(method(queries, support, labels, n_way)).all()
    assert np.isfinite(method(np.ones((3, 24)), np.zeros_like(support), labels, n_way)).all()


def test_mistakes_are_named():
    queries, _, support, labels, n_way = task()
    with pytest.raises(EmptyClassError, match="label 3 of 4"):
        soft_kmeans(queries, support, labels, 4)
    with pytest.raises(ValueError, match="0 to 1"):
        bd_cspn(queries, support, labels, 2)
    with pytest.raises(ValueError, match="belong together"):
        alpha_tim(queries[:, :5], support, labels, n_way)
    with pytest.raises(ValueError, match="belong together"):
        alpha_tim(queries, support, labels[:2], n_way)
    for options in ({"temperature": 0}, {"iterations": -1}, {"query_weight": 0}, {"share_prior": -1}):
        with pytest.raises(ConfigError):
            soft_kmeans(queries, support, labels, n_way, **options)
    for options in ({"alpha": 1}, {"temperature": 0}, {"iterations": -1}):
        with pytest.raises(ConfigError):
            alpha_tim(queries, support, labels, n_way, **options)
    with pytest.raises(ConfigError):
        bd_cspn(queries, support, labels, n_way, temperature=-1)
