import numpy as np
import pytest
import torch

from fewshot_engine.losses import prototypical_loss


def test_loss_equals_the_slow_reference():
    generator = torch.Generator().manual_seed(0)
    z = torch.nn.functional.normalize(torch.randn(2, 3, 5, 8, generator=generator), dim=3)  # 2 shots, 3 queries
    losses, right = [], []
    for episode in z:
        prototypes = [photos[:2].mean(dim=0) for photos in episode]
        for way in range(3):
            for query in episode[way, 2:]:
                cosines = torch.stack([query @ p / p.norm() for p in prototypes])
                losses.append(-torch.log_softmax(7 * cosines, dim=0)[way])
                right.append(float(cosines.argmax() == way))
    flat = z.flatten(1, 2)
    loss, accuracy = prototypical_loss(flat @ flat.mT, way=3, shot=2, scale=torch.tensor(7.0))
    assert float(loss) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert float(accuracy) == pytest.approx(np.mean(right))


def test_loss_does_not_depend_on_the_order_of_support():
    z = torch.nn.functional.normalize(torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(1)), dim=3)
    values = []
    for order in ([0, 1, 2, 3], [2, 0, 1, 3]):
        flat = z[:, :, order].flatten(1, 2)
        values.append(float(prototypical_loss(flat @ flat.mT, way=2, shot=3, scale=torch.tensor(3.0))[0]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_label_smoothing_by_hand():
    z = torch.nn.functional.normalize(torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0)), dim=3)
    flat = z.flatten(1, 2)
    options = {"way": 2, "shot": 1, "scale": torch.tensor(2.0)}
    smooth, _ = prototypical_loss(flat @ flat.mT, label_smoothing=0.2, **options)
    losses = []
    for way in range(2):
        for query in z[0, way, 1:]:
            logs = torch.log_softmax(2 * torch.stack([query @ z[0, k, 0] for k in range(2)]), dim=0)
            losses.append(-0.9 * logs[way] - 0.1 * logs[1 - way])  # 0.2 spread over two ways
    assert float(smooth) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
