"""*Adapt*: the closed form, what is chosen for it, and what episodes add, each against a slow reference."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fewshot_engine import adaptation
from fewshot_engine.adaptation import (
    Adapter,
    Choice,
    Scatter,
    accuracy_by_products,
    choose,
    coordinates,
    familiar,
    folds_of_kin,
    leave_classes_out,
    principal_axes,
    thinned_evenly,
)
from fewshot_engine.config import EpisodeConfig, TrainConfig
from fewshot_engine.datasets import ClassSplit, EpisodePlan, TrainData
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.errors import ConfigError, DataError
from fewshot_engine.evaluation import evaluate
from fewshot_engine.recipes import Recipe, load_recipe
from fewshot_engine.reports import Finished
from fewshot_engine.training import meta_train

CONFIG = TrainConfig(kind="adapt", episode=EpisodeConfig(3, 2, 4), epochs=1, episodes_per_epoch=20, eval_episodes=60)


def shop(n_classes=16, photos=10, dim=40, seed=0, shared=12, first=0):
    """Classes differ in 8 directions, photos of one class more in 8 others, and all share one: their kind."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(n_classes), photos)
    x = 0.15 * rng.standard_normal((len(labels), dim))
    x[:, first : first + 8] += rng.standard_normal((n_classes, 8))[labels]
    x[:, first + 8 : first + 16] += 1.5 * rng.standard_normal((len(labels), 8))
    x[:, first + 16] += shared
    return x.astype(np.float32), labels


def adapter(data, base, validation, *, groups=None, split=None):
    x, labels = data
    train = TrainData(tuple(f"c{i}" for i in range(labels.max() + 1)), labels, groups, x, split=split)
    chosen = np.where(np.isin(labels, base), labels, -1)
    photos = torch.from_numpy(np.flatnonzero(np.isin(labels, validation)))
    return Adapter(CONFIG, train, chosen, photos, torch.zeros(0, dtype=torch.long), torch.device("cpu"))


def taught(learner, seed=1):
    """The same, with a correction as if it had learned something."""
    with torch.no_grad():
        learner.inner.copy_(0.02 * torch.randn(learner.inner.shape, generator=torch.Generator().manual_seed(seed)))
    return learner


def finished_recipe(learner):
    tensors, card = learner.model(learner.state())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Recipe(**arrays, share=card["share"], familiar_from=card["familiar_from"], card=card)


def test_the_closed_form_by_hand():
    # Two classes at x = ±1, each with photos at y = ±2: scatter diag(0, 4), mean eigenvalue 2.
    x = torch.tensor([[1.0, 2], [1, -2], [-1, 2], [-1, -2]]) + torch.tensor([3.0, 0])
    scatter = Scatter.of(x, torch.tensor([0, 0, 1, 1]))
    assert scatter.centre.tolist() == pytest.approx([3, 0])
    assert (scatter.values.tolist(), float(scatter.mean_value)) == ([pytest.approx(4)], pytest.approx(2))
    # with shrinkage 3: 1 where photos of a class do not differ, (6 / (4 + 6))^(1/2) where they do
    white = scatter.whitening(Choice(3, 0, 1))(torch.tensor([[4.0, 1]]))
    assert white.flatten().tolist() == pytest.approx([1, 0.6**0.5])
    # the classes differ along x: a damping of 1/4 takes as much off
    white = scatter.whitening(Choice(3, 0.25, 1))(torch.tensor([[4.0, 1]]))
    assert white.flatten().tolist() == pytest.approx([0.75, 0.6**0.5])


@pytest.mark.parametrize("photos", [4, 40], ids=["fewer photos than dimensions", "more"])
def test_the_closed_form_is_its_definition(photos):
    labels = torch.arange(5).repeat_interleave(photos)
    x = torch.randn(5 * photos, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(photos))
    scatter = sum(torch.cov(x[labels == c].T, correction=0) for c in range(5)) / 5
    shrunk = 3 * scatter.trace() / 30
    values, vectors = torch.linalg.eigh(scatter + shrunk * torch.eye(30))
    expected = (x - x.mean(dim=0)) @ vectors @ torch.diag((shrunk / values) ** 0.5) @ vectors.T
    assert torch.allclose(
        Scatter.of(x.float(), labels).whitening(Choice(3, 0, 1))(x.float()).double(), expected, atol=1e-4
    )


def test_a_whitening_is_one_small_core():
    x, labels = (torch.from_numpy(array) for array in shop(6, 4))
    whitening = Scatter.of(x, labels).whitening(Choice(1, 0.5, 1))
    basis = torch.linalg.qr(torch.cat([whitening.axes, whitening.broad[:, None]], dim=1)).Q
    z = x - whitening.centre
    assert torch.allclose(whitening(x), z + z @ basis @ whitening.core(basis) @ basis.mT, atol=1e-4)


def test_a_choice_is_judged_by_what_it_would_give():
    x, labels = (torch.from_numpy(array) for array in shop(8, 6))
    x = normalize(x, dim=1)
    fold = leave_classes_out(x, labels, 0)[0]
    exam = next(iter(adaptation._exams(fold, x, labels, None, 0)))
    choice = Choice(3.0, 0.5, 0.75)
    adapted = normalize(fold.scatter.whitening(choice)(x[fold.rows]), dim=1)
    both = torch.cat([0.5 * x[fold.rows], 0.75**0.5 * adapted], dim=1)
    assert exam.accuracy(choice) == pytest.approx(accuracy_by_products(both @ both.mT, exam.episodes), abs=0.002)


def test_classes_count_alike_whatever_their_size():
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 2], [-1, -2]])
    often = torch.cat([x, x[:2], x[:2]])
    one, other = (Scatter.of(rows, (rows[:, 0] < 0).long()) for rows in (x, often))
    assert torch.allclose(one.centre, other.centre)
    assert torch.allclose(one.values, other.values)


def test_principal_axes_are_orthonormal_and_the_largest():
    rows = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    axes, values = principal_axes(rows, 5)
    assert torch.allclose(axes.mT @ axes, torch.eye(5), atol=1e-5)
    assert torch.allclose(values, torch.linalg.svdvals(rows)[:5].flip(0) ** 2, rtol=1e-4)
    assert torch.allclose(rows.mT @ rows @ axes, axes * values, atol=1e-3)


def test_coordinates_keep_the_products():
    rows = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    short = coordinates(rows)
    assert short.shape == (7, 7)
    assert torch.allclose(short @ short.mT, rows @ rows.mT, atol=1e-4)


def test_thinning_takes_from_the_large_classes_first():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    kept = thinned_evenly(labels, 30, seed=0)
    assert torch.bincount(labels[kept]).tolist() == [13, 3, 13]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(thinned_evenly(labels, 73, seed=0)) == 73
    assert torch.bincount(labels[thinned_evenly(labels, 2, seed=0)]).tolist() == [1, 1, 1]


def test_accuracy_by_products_equals_the_slow_reference():
    x, labels = shop(5, 8)
    x = normalize(torch.from_numpy(x), dim=1)
    plan = EpisodePlan(3, 2, 4)
    drawn = EpisodeSampler(labels, episode=plan, generator=torch.Generator().manual_seed(0)).sample(20)
    right = []
    for support, query in zip(drawn.support, drawn.query, strict=True):
        prototypes = normalize(torch.stack([x[photos].mean(dim=0) for photos in support]), dim=1)
        right += [int((prototypes @ x[photo]).argmax() == way) for way, photos in enumerate(query) for photo in photos]
    assert accuracy_by_products(x @ x.mT, drawn) == pytest.approx(np.mean(right))


def test_classes_of_one_kind_are_in_one_fold():
    kinds = torch.tensor([[9.0, 0], [0, 9], [-9, 0], [0, -9]]).repeat_interleave(3, dim=0)
    means = kinds + torch.rand(12, 2, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    folds = folds_of_kin(means[order])[order.argsort()].view(4, 3)
    assert (folds == folds[:, :1]).all()
    assert folds[:, 0].unique().tolist() == [0, 1, 2, 3]
    assert folds_of_kin(means[:3]).tolist() == [0, 0, 0]


def test_folds_share_out_the_classes_and_leave_them_out():
    x, labels = (torch.from_numpy(array) for array in shop(10, 6))
    folds = leave_classes_out(x, labels, seed=0)
    assert sorted(torch.cat([fold.rows for fold in folds]).tolist()) == list(range(60))
    assert sorted(len(torch.unique(labels[fold.rows])) for fold in folds) == [2, 2, 3, 3]
    kept = torch.ones(60, dtype=torch.bool)
    kept[folds[0].rows] = False
    assert torch.equal(folds[0].scatter.centre, Scatter.of(x[kept], labels[kept]).centre)
    assert leave_classes_out(x[:18], labels[:18], seed=0) == []  # of three classes none can be spared


def test_the_choice_goes_where_whitening_helps_and_where_it_does_not():
    x, labels = shop()
    x, labels = normalize(torch.from_numpy(x), dim=1), torch.from_numpy(labels)
    helped = choose(leave_classes_out(x, labels, 0), x, labels, None, 0)
    assert (helped.shrinkage, helped.share) == (min(adaptation.SHRINKAGES), 1.0)
    rng = np.random.default_rng(0)  # what classes differ in, photos differ in: to whiten would spoil it
    same = rng.standard_normal((16, 6))[labels] + 0.7 * rng.standard_normal((160, 6))
    z = normalize(torch.from_numpy(np.pad(same, ((0, 0), (0, 34)))).float(), dim=1)
    assert choose(leave_classes_out(z, labels, 0), z, labels, None, 0).shrinkage > 1
    few = labels < 3
    assert choose(leave_classes_out(x[few], labels[few], 0), x[few], labels[few], None, 0) == adaptation.FALLBACK


def test_a_burst_is_not_on_both_sides_of_what_a_choice_is_made_by():
    x, labels = shop(8, 6)
    groups = np.arange(48) // 3  # two bursts of three in each class: one shot and one query image, never five shots
    x = normalize(torch.from_numpy(x), dim=1)
    folds = leave_classes_out(x, torch.from_numpy(labels), 0)
    exams = list(adaptation._exams(folds[0], x, torch.from_numpy(labels), groups, 0))
    (exam,) = exams
    own = groups[folds[0].rows.numpy()]
    drawn = own[exam.episodes.indices().numpy()]
    assert exam.episodes.support.shape[2] == exam.episodes.query.shape[2] == 1
    assert (drawn[..., 0] != drawn[..., 1]).all()


def test_cosines_are_those_of_embeddings_whitened_without_their_own_fold():
    learner = taught(adapter(shop(), range(12), range(12, 16)))
    photos = torch.randint(0, 120, (2, 30), generator=torch.Generator().manual_seed(0))
    y = torch.empty(120, 40)
    for fold in leave_classes_out(learner.frozen, learner.labels, CONFIG.seed):
        y[fold.rows] = fold.scatter.whitening(learner.choice)(learner.frozen[fold.rows]) / learner.length
    centred = (learner.frozen - learner.scatter.centre) @ learner.directions
    y += learner.gain * centred @ learner.inner.detach() @ learner.directions.mT
    z = normalize(y, dim=1)[photos]
    assert torch.allclose(learner.cosines(photos), z @ z.mT, atol=1e-5)


def test_cosines_without_a_table_are_the_same(monkeypatch):
    learner = taught(adapter(shop(), range(12), range(12, 16)))
    photos = torch.randint(0, 120, (2, 30), generator=torch.Generator().manual_seed(0))
    looked_up = learner.cosines(photos)
    learner.learned.table = None
    monkeypatch.setattr(adaptation, "TABLE_PHOTOS", 0)
    assert torch.allclose(learner.cosines(photos), looked_up, atol=1e-5)


def test_what_is_evaluated_is_what_the_finished_model_gives():
    data = shop()
    apart = ClassSplit(tuple(range(12)), tuple(range(12, 16)))  # set apart by the caller: not in the last fit either
    learner = taught(adapter(data, range(12), range(12, 16), split=apart))
    recipe = finished_recipe(learner)
    photos = torch.arange(120, 160)
    frozen, trained = learner.embed_frozen(photos), learner.embed_trained(photos)
    x = data[0][120:]
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert (frozen @ frozen.mT).numpy() == pytest.approx(unit @ unit.T, abs=1e-4)
    adapted = recipe.apply(x, familiarity=recipe.familiarity(x))
    assert (trained @ trained.mT).numpy() == pytest.approx(adapted @ adapted.T, abs=1e-4)


def test_the_last_fit_takes_in_the_classes_that_were_drawn_to_validate_with():
    x, labels = shop()
    recipe = finished_recipe(adapter((x, labels), range(12), range(12, 16)))
    everything = Scatter.of(normalize(torch.from_numpy(x), dim=1), torch.from_numpy(labels))
    assert recipe.centre == pytest.approx(everything.centre.numpy(), abs=1e-6)
    assert len(recipe.class_means) == 16
    assert recipe.card["adapted_to"] == [f"c{i}" for i in range(16)]
    apart = ClassSplit(tuple(range(12)), tuple(range(12, 16)))
    assert len(finished_recipe(adapter((x, labels), range(12), range(12, 16), split=apart)).class_means) == 12


def test_restoring_brings_the_directions_back_with_the_signs_they_had():
    data = shop()
    learner, other = taught(adapter(data, range(12), range(12, 16))), adapter(data, range(12), range(12, 16))
    other.directions = -other.directions  # another machine
    other.learned.project(other)
    other.restore(learner.state())
    photos = torch.arange(60)[None]
    assert torch.allclose(other.cosines(photos), learner.cosines(photos), atol=1e-6)
    held_out = torch.arange(120, 160)
    one, two = learner.embed_trained(held_out), other.embed_trained(held_out)
    assert torch.allclose(one @ one.mT, two @ two.mT, atol=1e-5)


def test_familiar_is_what_new_classes_of_the_kind_reach():
    x, labels = shop()
    x = normalize(torch.from_numpy(x), dim=1)
    means, familiar_from = familiar(x, torch.from_numpy(labels))
    assert torch.allclose(means.norm(dim=1), torch.ones(16))
    folds = folds_of_kin(means)
    nearest = [
        max(float(photo @ means[c]) for c in range(16) if folds[c] != folds[label])
        for photo, label in zip(x, labels, strict=True)
    ]
    assert familiar_from == pytest.approx(np.quantile(nearest, adaptation.UNFAMILIAR_SHARE), abs=1e-5)


def test_away_from_what_it_was_adapted_to_the_frozen_encoder_answers(tmp_path):
    """New classes of the kind gain, and another kind of photo, whose classes are what was noise, loses nothing."""
    x, labels = shop(n_classes=22)
    data = TrainData(tuple(map(str, range(16))), labels[:160], embeddings=x[:160])
    (finished,) = [
        report
        for report in meta_train(CONFIG, data, checkpoint=tmp_path / "run.safetensors")
        if isinstance(report, Finished)
    ]
    recipe = load_recipe(finished.model)
    fresh, other = (x[160:], labels[160:]), shop(6, seed=5, first=8)
    for (photos, of), gains in ((fresh, True), (other, False)):
        shape = {"way": 5, "shot": 1, "query": 5, "episodes": 300}
        frozen = evaluate(photos, of, **shape).accuracy
        blended = evaluate(recipe.apply(photos, familiarity=recipe.familiarity(photos)), of, **shape).accuracy
        alone = evaluate(recipe.apply(photos, familiarity=1.0), of, **shape).accuracy
        if gains:
            assert blended > frozen + 0.1
        else:
            assert blended > frozen - 0.005
            assert alone < frozen - 0.05


def test_bad_embeddings_are_named():
    x, labels = shop(4, 4)
    data = TrainData(("a", "b", "c", "d"), labels)
    nothing = torch.zeros(0, dtype=torch.long)
    with pytest.raises(ConfigError, match="none were given"):
        Adapter(CONFIG, data, labels, nothing, nothing, torch.device("cpu"))
    x[3, 3] = np.nan
    with pytest.raises(DataError, match="no numbers"):
        adapter((x, labels), range(4), range(4))
