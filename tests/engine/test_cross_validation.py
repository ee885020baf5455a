import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fewshot_engine import cross_validation
from fewshot_engine.cross_validation import accuracy_by_products, choose, familiar, folds_of_kin, leave_classes_out
from fewshot_engine.datasets import EpisodePlan
from fewshot_engine.episodes import EpisodeSampler
from fewshot_engine.whitening import Choice, Scatter
from tests.engine.test_adaptation import shop


def test_a_choice_is_judged_by_what_it_would_give():
    x, labels = (torch.from_numpy(array) for array in shop(8, 6))
    x = normalize(x, dim=1)
    fold = leave_classes_out(x, labels, 0)[0]
    exam = next(iter(cross_validation._exams(fold, x, labels, None, 0)))
    choice = Choice(3.0, 0.5, 0.75)
    adapted = normalize(fold.scatter.whitening(choice)(x[fold.rows]), dim=1)
    both = torch.cat([0.5 * x[fold.rows], 0.75**0.5 * adapted], dim=1)
    assert exam.accuracy(choice) == pytest.approx(accuracy_by_products(both @ both.mT, exam.episodes), abs=0.002)


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
    assert (helped.shrinkage, helped.share) == (min(cross_validation.SHRINKAGES), 1.0)
    rng = np.random.default_rng(0)  # what classes differ in, photos differ in: to whiten would spoil it
    same = rng.standard_normal((16, 6))[labels] + 0.7 * rng.standard_normal((160, 6))
    z = normalize(torch.from_numpy(np.pad(same, ((0, 0), (0, 34)))).float(), dim=1)
    assert choose(leave_classes_out(z, labels, 0), z, labels, None, 0).shrinkage > 1
    few = labels < 3
    assert choose(leave_classes_out(x[few], labels[few], 0), x[few], labels[few], None, 0) == cross_validation.FALLBACK


def test_a_burst_is_not_on_both_sides_of_what_a_choice_is_made_by():
    x, labels = shop(8, 6)
    groups = np.arange(48) // 3  # two bursts of three in each class: one shot and one query image, never five shots
    x = normalize(torch.from_numpy(x), dim=1)
    folds = leave_classes_out(x, torch.from_numpy(labels), 0)
    exams = list(cross_validation._exams(folds[0], x, torch.from_numpy(labels), groups, 0))
    (exam,) = exams
    own = groups[folds[0].rows.numpy()]
    drawn = own[exam.episodes.indices().numpy()]
    assert exam.episodes.support.shape[2] == exam.episodes.query.shape[2] == 1
    assert (drawn[..., 0] != drawn[..., 1]).all()


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
    assert familiar_from == pytest.approx(np.quantile(nearest, cross_validation.UNFAMILIAR_SHARE), abs=1e-5)
