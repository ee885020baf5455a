import pytest
import torch

from fewshot_engine.whitening import Choice, Scatter, principal_axes, thinned_evenly
from tests.engine.test_adaptation import shop


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


def test_thinning_takes_from_the_large_classes_first():
    labels = torch.tensor([0] * 50 + [1] * 3 + [2] * 20)
    kept = thinned_evenly(labels, 30, seed=0)
    assert torch.bincount(labels[kept]).tolist() == [13, 3, 13]
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(thinned_evenly(labels, 73, seed=0)) == 73
    assert torch.bincount(labels[thinned_evenly(labels, 2, seed=0)]).tolist() == [1, 1, 1]
