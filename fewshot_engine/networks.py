"""*Full*: a backbone learned from pixels, with augmentation on the device that it runs on.

The learner is what `training` drives: it gives the cosines of an episode's photos and the numbers that may change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import Augmentation, TrainConfig
from fewshot_engine.datasets import Pixels, TrainData
from fewshot_engine.errors import CheckpointError, ConfigError

COMPILE_FROM = 2000  # episodes: fewer do not gain back the minute that compiling takes
FEWEST_AT_ONCE = 8  # photos: batch normalisation of fewer is noise, and hardly any memory is left to gain
EVALUATED_AT_ONCE = {"cuda": 256, "cpu": 32}  # photos


class Network:
    """The backbone of *full*, from pixels: uint8 until they are on the device, where all of them stay if they fit.

    A photo's index runs from 0 to n; one above stands for the same photo turned by 90 degrees once more for each n.
    """

    def __init__(self, config: TrainConfig, data: TrainData, device: torch.device) -> None:
        if data.pixels is None:
            raise ConfigError("full learns from pixels, and none were given")
        entry = get_backbone(config.backbone)
        self.entry, self.config, self.device = entry, config, device
        self.photos = len(data.labels)
        self.pixels = _on_device(data.pixels, device)
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net: nn.Module = entry.build(config.image_size).to(device)
        self.net = self.net.to(memory_format=torch.channels_last)  # a step of Conv-4 takes 0.6 of the time on the CPU
        self.mean = torch.tensor(entry.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(entry.std, device=device).view(3, 1, 1)
        self.dtype = torch.bfloat16 if config.mixed_precision and device.type == "cuda" else torch.float32
        self.starts_trained = entry.pretrained
        self.at_once: int | None = None  # photos that go through the network together; all of a step's when None
        self.asked = 0  # photos of the last step
        self.frozen_statistics = entry.pretrained  # an episode's few classes would make poor ones
        self.inputs: Callable[..., Tensor] = network_inputs
        self.running: Callable[[Tensor], Tensor] = self.net
        self.is_searching = False  # for as many photos as fit, since memory ran out
        if device.type == "cuda" and worth_compiling(config):
            self.inputs = torch.compile(network_inputs)
            self.running = torch.compile(self.net)

    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    def statistics(self) -> list[Tensor]:
        return [buffer for buffer in self.net.buffers() if buffer.is_floating_point()]

    def cosines(self, photos: Tensor) -> Tensor:
        z = self.embed_training(photos.flatten()).view(*photos.shape, -1)  # (b, p, dim)
        return torch.bmm(z, z.mT)

    def embed_training(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, dim), L2-normalised: augmented, and with gradient."""
        self.net.train()
        if self.frozen_statistics:
            for module in _normalisations(self.net):
                module.eval()
        self.asked = len(photos)
        x = self._prepared(photos, self._draws(len(photos)))
        running = self.net if self.is_searching else self.running  # each number of photos is compiled anew
        parts = 1 if self.at_once is None else math.ceil(len(x) / self.at_once)
        if parts == 1:
            return F.normalize(self._forward(x, running), dim=1)
        # Every part-th photo, so that batch normalisation sees photos of all classes in each part.
        places = torch.cat([torch.arange(part, len(x), parts) for part in range(parts)])
        features = [
            checkpoint(
                self._forward,
                x[part::parts],
                running,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=self._first_and_again,
            )
            for part in range(parts)
        ]
        return F.normalize(torch.cat(features)[torch.argsort(places).to(self.device)], dim=1)

    def embed_frozen(self, photos: Tensor) -> Tensor:
        return self.embed_trained(photos)  # asked for before the first step only

    @torch.no_grad()
    def embed_trained(self, photos: Tensor) -> Tensor:
        self.net.eval()
        size = min(EVALUATED_AT_ONCE[self.device.type], self.at_once or self.photos)
        return torch.cat([self._forward(self._prepared(part, None), self.net) for part in torch.split(photos, size)])

    def back_off(self) -> str | None:
        now = min(self.at_once or self.asked, self.asked)
        if now <= FEWEST_AT_ONCE:
            return None
        self.at_once = max(FEWEST_AT_ONCE, math.ceil(now / 2))
        self.is_searching = True
        return self.memory_note()

    def memory_sufficed(self) -> None:
        self.is_searching = False

    def memory_note(self) -> str | None:
        """What a step does since memory ran out, and what batch normalisation then sees; None where it never did."""
        if self.at_once is None:
            return None
        seen = (
            "Batch normalisation is frozen, so the gradient is the same."
            if self.frozen_statistics
            else "Batch normalisation sees those photos alone, instead of all of a step's."
        )
        return (
            f"Memory ran out: {self.at_once} photos go through the network at a time, and once more for the gradient. "
            f"{seen}"
        )

    def begin_from(self, tensors: dict[str, NDArray[Any]], card: dict[str, Any]) -> None:
        """Take over the weights of a finished model of the same backbone.

        Raises:
            CheckpointError: it is another backbone, or of the kind *adapt*.
        """
        if card.get("backbone") != self.entry.name or card.get("kind") != "full":
            raise CheckpointError(
                f"the model to start from is {card.get('backbone')} ({card.get('kind')}); this run trains "
                f"{self.entry.name} (full)"
            )
        try:
            self.net.load_state_dict({name: torch.from_numpy(array) for name, array in tensors.items()})
        except RuntimeError as error:
            raise CheckpointError(f"the model to start from does not fit: {error}") from error
        self.starts_trained = True

    def state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.net.state_dict().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.net.load_state_dict(state)

    def model(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        size = self.config.image_size
        card = {
            "backbone": self.entry.name,
            "image_size": size,
            "mean": list(self.entry.mean),
            "std": list(self.entry.std),
            "dim": self.entry.dim(size),
        }
        return state, card

    def _prepared(self, photos: Tensor, draws: Tensor | None) -> Tensor:
        """(m,) -> (m, 3, s, s), as the network takes them."""
        raw = self._raw(photos % self.photos)
        side = self.config.image_size
        if raw.shape[1:] != (side, side, 3) or raw.dtype != torch.uint8:
            raise ConfigError(f"pixels are {raw.dtype} {tuple(raw.shape[1:])}: they are uint8 ({side}, {side}, 3)")
        turns = _sent(photos // self.photos, self.device) if self.config.rotations_as_classes else None
        inputs = self.inputs if draws is not None else network_inputs  # evaluation is not worth compiling for
        x = inputs(raw, turns, draws, self.config.augmentation, self.mean, self.std)
        return x.to(self.dtype).contiguous(memory_format=torch.channels_last)

    def _raw(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, s, s, 3) on the device, as stored."""
        if isinstance(self.pixels, Tensor):
            return self.pixels[_sent(photos, self.pixels.device)]
        chosen = self.pixels(photos.numpy()) if callable(self.pixels) else self.pixels[photos.numpy()]
        return _sent(torch.from_numpy(np.ascontiguousarray(chosen)), self.device)

    def _draws(self, photos: int) -> Tensor:
        """(DRAWS, photos), in [-1, 1): outside of what is compiled, for its generator is kept in checkpoints."""
        return torch.rand(DRAWS, photos, generator=self.generator, device=self.device) * 2 - 1

    def _forward(self, x: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            features = network(x)
        return features.float()

    def _first_and_again(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds a part's first pass, and its second: running statistics take a photo in once."""
        return nullcontext(), nullcontext() if self.frozen_statistics else _statistics_kept(self.net)


def worth_compiling(config: TrainConfig) -> bool:
    """Whether a GPU run is long enough to gain back what is spent on making its steps fast, or is told that it is."""
    return config.total_episodes >= COMPILE_FROM if config.compiled is None else config.compiled


DRAWS = 8  # random numbers that `augment` takes for each photo


def network_inputs(
    raw: Tensor,
    turns: Tensor | None,
    draws: Tensor | None,
    augmentation: Augmentation,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """(m, s, s, 3) uint8 -> (m, 3, s, s) float: turned, augmented where there are `draws`, normalised.

    Args:
        mean, std: (3, 1, 1), of the channels.
    """
    pictures = raw.permute(0, 3, 1, 2).float() / 255
    if turns is not None:
        pictures = turned(pictures, turns)
    if draws is not None:
        pictures = augment(pictures, draws, augmentation)
    return (pictures - mean) / std


def turned(pictures: Tensor, turns: Tensor) -> Tensor:
    """(n, c, s, s), each turned anticlockwise by 90 degrees as often as its entry of `turns`, (n,) in [0, 3], says."""
    times = turns.view(-1, 1, 1, 1)
    pictures = torch.where(times % 2 == 1, torch.rot90(pictures, 1, (2, 3)), pictures)
    return torch.where(times >= 2, torch.rot90(pictures, 2, (2, 3)), pictures)


def augment(pictures: Tensor, draws: Tensor, augmentation: Augmentation) -> Tensor:
    """Each picture turned, scaled, moved, mirrored and coloured anew, as far as the configuration lets it.

    Args:
        pictures: (n, 3, s, s) in [0, 1]; what comes in at the border repeats its edge.
        draws: (8, n), evenly from [-1, 1).
    """
    mirrored = draws[4] < 0
    if augmentation.rotation or augmentation.crop:
        angle, scale = draws[0] * math.radians(augmentation.rotation), 1 + augmentation.crop * draws[1]
        mirror = torch.where(mirrored, -1.0, 1.0) if augmentation.flips else torch.ones_like(scale)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        moved = 1.2 * augmentation.crop * draws[2:4]  # 2 is the picture's width
        rows = [cos * mirror, -sin, moved[0], sin * mirror, cos, moved[1]]
        theta = torch.stack(rows, dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
        pictures = F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)
    elif augmentation.flips:
        pictures = torch.where(mirrored.view(-1, 1, 1, 1), pictures.flip(3), pictures)
    if augmentation.colour:
        brightness, contrast, saturation = (1 + augmentation.colour * draws[5:8]).view(3, -1, 1, 1, 1)
        pictures = (pictures * brightness).clamp(0, 1)
        middle = grey(pictures).mean(dim=(2, 3), keepdim=True)
        pictures = (middle + (pictures - middle) * contrast).clamp(0, 1)
        light = grey(pictures)
        pictures = (light + (pictures - light) * saturation).clamp(0, 1)
    return pictures


def grey(pictures: Tensor) -> Tensor:
    """(n, 3, s, s) -> (n, 1, s, s), by what red, green and blue give to brightness (ITU-R BT.601)."""
    return 0.299 * pictures[:, :1] + 0.587 * pictures[:, 1:2] + 0.114 * pictures[:, 2:]


def _normalisations(net: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


@contextmanager
def _statistics_kept(net: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch, as ever, without moving the running statistics."""
    momenta = [(module, module.momentum) for module in _normalisations(net)]
    for module, _ in momenta:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum in momenta:
            module.momentum = momentum


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device; without waiting for what the GPU has still to do."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _on_device(pixels: Pixels, device: torch.device) -> Pixels | Tensor:
    """All of the photos on the GPU if they take less than a third of what is free there."""
    if device.type != "cuda" or callable(pixels):
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    return torch.tensor(np.asarray(pixels), device=device) if pixels.nbytes < free / 3 else pixels
