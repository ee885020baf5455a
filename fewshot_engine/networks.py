"""*Full*: a backbone learned from pixels, with augmentation on the device that it runs on.

The learner is what `training` drives: it gives the cosines of an episode's photos and the numbers that may change.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fewshot_engine.backbones import get_backbone
from fewshot_engine.config import TrainConfig
from fewshot_engine.datasets import Pixels, TrainData
from fewshot_engine.errors import ConfigError


class Network:
    """The backbone of *full*, from pixels: uint8 until they are on the device, where all of them stay if they fit."""

    starts_trained = False

    def __init__(
        self, config: TrainConfig, data: TrainData, base: NDArray[np.int64], validation: Tensor, device: torch.device
    ) -> None:
        if data.pixels is None:
            raise ConfigError("full learns from pixels, and none were given")
        entry = get_backbone(config.backbone)
        self.entry, self.config, self.device = entry, config, device
        self.pixels = _on_device(data.pixels, device)
        self.generator = torch.Generator(device=device).manual_seed(config.seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.net: nn.Module = entry.build(config.image_size).to(device)
        if device.type == "cuda":
            self.net = self.net.to(memory_format=torch.channels_last)
        self.mean = torch.tensor(entry.mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(entry.std, device=device).view(3, 1, 1)

    def parameters(self) -> list[Tensor]:
        return list(self.net.parameters())

    def cosines(self, photos: Tensor) -> Tensor:
        self.net.train()
        if self.entry.pretrained:  # an episode's few classes would make poor statistics of batch normalisation
            for module in self.net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        x = augment(self._pictures(photos.flatten()), self.generator, flips=self.config.flips)
        z = F.normalize(self._forward(x), dim=1).view(*photos.shape, -1)  # (b, p, dim)
        return torch.bmm(z, z.mT)

    def embed_frozen(self, photos: Tensor) -> Tensor:
        return self.embed_trained(photos)  # asked for before the first step only

    @torch.no_grad()
    def embed_trained(self, photos: Tensor) -> Tensor:
        self.net.eval()
        size = 256 if self.device.type == "cuda" else 32
        return torch.cat([self._forward(self._pictures(part)) for part in torch.split(photos, size)])

    def _pictures(self, photos: Tensor) -> Tensor:
        """(m,) -> (m, 3, s, s) float32 in [0, 1]."""
        if callable(self.pixels):
            raw = torch.from_numpy(np.ascontiguousarray(self.pixels(photos.numpy())))
        elif isinstance(self.pixels, Tensor):
            raw = self.pixels[photos.to(self.pixels.device)]
        else:
            raw = torch.from_numpy(np.ascontiguousarray(self.pixels[photos.numpy()]))
        side = self.config.image_size
        if raw.shape[1:] != (side, side, 3) or raw.dtype != torch.uint8:
            raise ConfigError(f"pixels are {raw.dtype} {tuple(raw.shape[1:])}: they are uint8 ({side}, {side}, 3)")
        return raw.to(self.device).permute(0, 3, 1, 2).float() / 255

    def _forward(self, pictures: Tensor) -> Tensor:
        x = (pictures - self.mean) / self.std
        cuda = self.device.type == "cuda"
        x = x.contiguous(memory_format=torch.channels_last if cuda else torch.contiguous_format)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=cuda):
            features: Tensor = self.net(x)
        return features.float()

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


def augment(pictures: Tensor, generator: torch.Generator, *, flips: bool) -> Tensor:
    """Each picture turned by up to 10°, scaled by up to 10 %, moved by up to 6 %, and mirrored half of the time.

    Small enough to change no meaning, but that mirrored letters are others: hence `flips`.

    Args:
        pictures: (n, 3, s, s) float in any range; what comes in at the border repeats its edge.
    """
    n = len(pictures)
    uniform = torch.rand(5, n, generator=generator, device=pictures.device) * 2 - 1
    angle, scale = uniform[0] * math.radians(10), 1 + 0.1 * uniform[1]
    mirror = torch.where(uniform[4] < 0, -1.0, 1.0) if flips else torch.ones_like(scale)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [cos * mirror, -sin, 0.12 * uniform[2], sin * mirror, cos, 0.12 * uniform[3]]  # 2 is the picture's width
    theta = torch.stack(rows, dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _on_device(pixels: Pixels, device: torch.device) -> Pixels | Tensor:
    """All of the photos on the GPU if they take less than a third of what is free there."""
    if device.type != "cuda" or callable(pixels):
        return pixels
    free, _ = torch.cuda.mem_get_info(device)
    return torch.tensor(np.asarray(pixels), device=device) if pixels.nbytes < free / 3 else pixels
