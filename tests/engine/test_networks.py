import numpy as np
import pytest
import torch

from fewshot_engine.config import Augmentation, TrainConfig
from fewshot_engine.datasets import TrainData
from fewshot_engine.errors import CheckpointError
from fewshot_engine.networks import DRAWS, Network, augment, turned

CPU = torch.device("cpu")
CONV4 = TrainConfig(kind="full", backbone="conv4", image_size=28)


def photos(n=24, size=28, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (n, size, size, 3), dtype=np.uint8)
    return TrainData(("a", "b"), np.arange(n) % 2, pixels=pixels)


def draws(n, seed=0):
    return torch.rand(DRAWS, n, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def half_bright(n=64):
    pictures = torch.zeros(n, 3, 16, 16)
    pictures[..., :8] = 1
    return pictures


@pytest.mark.parametrize("rotation", [0, 10])
def test_augmentation_mirrors_only_when_it_may(rotation):
    settings = {"rotation": rotation, "crop": rotation / 100, "colour": 0}
    kept = augment(half_bright(), draws(64), Augmentation(flips=False, **settings))
    assert kept.shape == (64, 3, 16, 16)
    assert (kept[..., :4].mean(dim=(1, 2, 3)) > 0.8).all()
    mirrored = augment(half_bright(), draws(64), Augmentation(flips=True, **settings))
    share = (mirrored[..., :4].mean(dim=(1, 2, 3)) < 0.2).float().mean()
    assert 0.3 < share < 0.7


def test_augmentation_switched_off_changes_nothing():
    off = Augmentation(flips=False, rotation=0, crop=0, colour=0)
    assert torch.equal(augment(half_bright(), draws(64), off), half_bright())


def test_colours_change_by_hand():
    grey = torch.full((1, 3, 4, 4), 0.5)
    numbers = torch.zeros(DRAWS, 1)
    numbers[5] = 0.5  # brightness; of a plain grey picture neither contrast nor saturation changes anything
    numbers[6:] = 1.0
    only_colour = Augmentation(flips=False, rotation=0, crop=0, colour=0.2)
    assert augment(grey, numbers, only_colour).unique().tolist() == pytest.approx([0.55])


def test_a_quarter_turn_moves_the_top_to_the_left():
    picture = torch.zeros(4, 1, 3, 3)
    picture[:, 0, 0] = 1  # the top row
    result = turned(picture, torch.arange(4))[:, 0]
    bright = [result[0][0], result[1][:, 0], result[2][2], result[3][:, 2]]  # top, left, bottom, right
    assert all(line.tolist() == [1, 1, 1] for line in bright)
    assert result.sum(dim=(1, 2)).tolist() == [3, 3, 3, 3]


def test_an_index_beyond_the_photos_is_the_photo_turned():
    config = TrainConfig(**{**CONV4.__dict__, "rotations_as_classes": True})
    network = Network(config, photos(), CPU)
    straight = network._prepared(torch.tensor([5]), None)
    for turn in range(4):
        assert torch.equal(network._prepared(torch.tensor([5 + 24 * turn]), None), straight.rot90(turn, (2, 3)))


def gradients_of(network, at_once):
    network.at_once = at_once
    network.generator.manual_seed(0)
    z = network.embed_training(torch.arange(24))
    return z, torch.autograd.grad((z[:12] @ z[12:].mT).square().sum(), network.parameters())


def test_portions_give_the_same_gradient_where_batch_normalisation_is_frozen():
    network = Network(CONV4, photos(), CPU)
    network.frozen_statistics = True
    whole, expected = gradients_of(network, None)
    parts, found = gradients_of(network, 10)
    assert torch.allclose(parts, whole, atol=1e-5)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(expected, found, strict=True))


def test_portions_move_the_running_statistics_once():
    network = Network(CONV4, photos(), CPU)
    _, _ = gradients_of(network, 12)
    once = [statistic.clone() for statistic in network.statistics()]
    other = Network(CONV4, photos(), CPU)
    other.at_once = 12
    other.generator.manual_seed(0)
    with torch.no_grad():  # the first pass alone
        other.embed_training(torch.arange(24))
    assert all(torch.equal(a, b) for a, b in zip(once, other.statistics(), strict=True))
    assert all(module.momentum == 0.1 for module in network.net.modules() if hasattr(module, "momentum"))


def test_backing_off_halves_the_portions_and_says_what_batch_normalisation_sees():
    network = Network(CONV4, photos(), CPU)
    assert network.memory_note() is None
    network.embed_training(torch.arange(24))
    assert "12 photos go through the network at a time" in network.back_off()
    assert "sees those photos alone" in network.memory_note()
    network.frozen_statistics = True
    assert "8 photos" in network.back_off()
    assert "the gradient is the same" in network.memory_note()
    assert network.back_off() is None


def test_how_many_photos_fit_is_found_out_before_that_many_are_compiled():
    network = Network(CONV4, photos(), CPU)
    compiled = []
    network.running = lambda x: compiled.append(len(x)) or network.net(x)
    network.embed_training(torch.arange(24))
    network.back_off()
    network.embed_training(torch.arange(24))
    assert compiled == [24]
    network.memory_sufficed()
    network.embed_training(torch.arange(24))
    assert compiled == [24, 12, 12]


def test_only_a_model_of_the_same_backbone_can_be_started_from():
    network = Network(CONV4, photos(), CPU)
    with pytest.raises(CheckpointError, match=r"is resnet12 \(full\); this run trains conv4"):
        network.begin_from({}, {"backbone": "resnet12", "kind": "full"})
    with pytest.raises(CheckpointError, match="does not fit"):
        network.begin_from({}, {"backbone": "conv4", "kind": "full"})
