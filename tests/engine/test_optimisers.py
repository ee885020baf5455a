import math

import numpy as np
import pytest
import torch

from fewshot_engine.config import TrainConfig
from fewshot_engine.optimisers import Average, Optimiser, clipped, rate_share


def slow_adamw(values, gradients, *, rate, decay):
    """Algorithm 2 of Loshchilov and Hutter 2019, number by number."""
    for i in range(len(values)):
        moment = square = 0.0
        for step, gradient in enumerate(gradients[:, i], start=1):
            moment = 0.9 * moment + 0.1 * gradient
            square = 0.999 * square + 0.001 * gradient**2
            values[i] -= rate * decay * values[i]
            values[i] -= rate * (moment / (1 - 0.9**step)) / ((square / (1 - 0.999**step)) ** 0.5 + 1e-8)
    return values


def slow_sgd(values, gradients, *, rate, decay):
    """Nesterov's momentum as Sutskever et al. 2013 write it, with the decay in the gradient."""
    for i in range(len(values)):
        velocity = 0.0
        for gradient in gradients[:, i]:
            whole = gradient + decay * values[i]
            velocity = 0.9 * velocity + whole
            values[i] -= rate * (whole + 0.9 * velocity)
    return values


@pytest.mark.parametrize(("name", "slow"), [("adamw", slow_adamw), ("sgd", slow_sgd)])
def test_the_optimiser_is_what_it_says(name, slow):
    config = TrainConfig(kind="full", learning_rate=1e-3, optimiser=name, weight_decay=0.1)
    rng = np.random.default_rng(0)
    start, gradients = rng.standard_normal(9), rng.standard_normal((5, 9))
    parameters = [torch.tensor(start[:6]).view(2, 3), torch.tensor(start[6:8]), torch.tensor(start[8])]
    optimiser = Optimiser(config, parameters)
    for row in torch.tensor(gradients):
        optimiser.step((row[:6].view(2, 3), row[6:8], row[8]), 1.0)
    weights = slow(start[:6].copy(), gradients[:, :6], rate=1e-3, decay=0.1)
    assert parameters[0].flatten().numpy() == pytest.approx(weights)
    biases = slow(start[6:8].copy(), gradients[:, 6:8], rate=1e-3, decay=0.0)
    assert parameters[1].numpy() == pytest.approx(biases)
    scale = slow(start[8:].copy(), gradients[:, 8:], rate=1e-2, decay=0.0)  # ten times as fast, never pulled
    assert float(parameters[2]) == pytest.approx(scale[0])


def test_an_optimiser_goes_on_where_it_was():
    def optimiser_of(parameters):
        return Optimiser(TrainConfig(kind="full"), parameters)

    one = [torch.ones(2, 2), torch.tensor(1.0)]
    straight, gradients = optimiser_of(one), [torch.ones(2, 2), torch.tensor(2.0)]
    straight.step(gradients, 1.0)
    other = [tensor.clone() for tensor in one]
    resumed = optimiser_of(other)
    resumed.restore({name: tensor.clone() for name, tensor in straight.state().items()})
    for optimiser in (straight, resumed):
        optimiser.step(gradients, 0.5)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_gradients_are_shortened_together():
    gradients = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]  # 5 long in all
    shorter = clipped(gradients, 1.0)
    assert torch.cat(shorter).tolist() == pytest.approx([0.6, 0, 0, 0.8], abs=1e-5)
    assert torch.equal(torch.cat(clipped(gradients, 10.0)), torch.cat(gradients))
    assert torch.equal(torch.cat(clipped(gradients, 0.0)), torch.cat(gradients))


def config_with(**values):
    return TrainConfig(epochs=1, episodes_per_epoch=100, **values)


def test_cosine_falls_from_one_to_zero_after_the_warm_up():
    config = config_with(schedule="cosine", warmup_episodes=20)
    shares = [rate_share(config, episode) for episode in (0, 9, 19, 20, 60, 100)]
    assert shares == pytest.approx([1 / 20, 10 / 20, 1, 1, 0.5, 0])
    assert rate_share(config_with(schedule="cosine"), 25) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_step_and_plateau_multiply_by_the_factor():
    step = config_with(schedule="step", rate_steps=(0.5, 0.75), rate_factor=0.1)
    assert [rate_share(step, episode) for episode in (0, 49, 50, 75)] == pytest.approx([1, 1, 0.1, 0.01])
    plateau = config_with(schedule="plateau", rate_factor=0.5)
    assert [rate_share(plateau, 60, drops=drops) for drops in (0, 1, 3)] == pytest.approx([1, 0.5, 0.125])
    assert rate_share(config_with(schedule="constant"), 99) == 1


def test_an_average_of_weights_by_hand():
    live = torch.tensor([0.0])
    average = Average([live], decay=0.5)
    means = []
    for value in (11.0, 4.0, 4.0):
        live.fill_(value)
        average.update()
        means.append(float(average.mean[0]))
    # decays are min(0.5, (1 + t) / (10 + t)): 2/11, 3/12, 4/13
    first = 11 * 9 / 11
    second = first / 4 + 4 * 3 / 4
    third = second * 4 / 13 + 4 * 9 / 13
    assert means == pytest.approx([first, second, third])
    with average.in_place():
        assert float(live) == pytest.approx(third)
    assert float(live) == 4
