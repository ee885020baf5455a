"""Rows of the table of backbones for timm's and open_clip's models, whose libraries are optional.

Once weights are kept, their record holds the row, so that listing and answering need neither library nor torch.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fewshot_engine import weights
from fewshot_engine.backbones import RGB, Backbone, Resampling, Say
from fewshot_engine.errors import CheckpointError, ConfigError, WeightsMissing

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class _Facts:
    """What the library says about a model; kept with its weights."""

    dim: int
    image_size: int
    mean: RGB
    std: RGB
    crop: float
    resampling: Resampling
    licence: str
    source: str


def make_backbone(name: str) -> Backbone:
    """The row of "timm:NAME" or "open_clip:ARCHITECTURE/PRETRAINED".

    Raises:
        ConfigError: the library is not installed, or has no such model.
    """
    library, _, model = name.partition(":")
    kind: type[_Timm] | type[_OpenClip] = _Timm if library == "timm" else _OpenClip
    row = kind(name, model)
    record = weights.find_record(name)
    try:
        facts = _facts_of(record.facts) if record else row.facts()
    except TypeError as error:
        raise CheckpointError(f"the record of {name}'s weights is damaged: fetch them again") from error

    def build(image_size: int) -> nn.Module:
        if image_size != facts.image_size:
            raise ConfigError(f"{name} takes pictures of {facts.image_size} px alone, not of {image_size} px")
        return row.build()

    return Backbone(
        name=name,
        title=f"{model}, of {library}",
        image_size=facts.image_size,
        mean=facts.mean,
        std=facts.std,
        licence=facts.licence,
        crop=facts.crop,
        resampling=facts.resampling,
        source=facts.source,
        _build=build,
        _dim=lambda image_size: facts.dim,
        _fetch=row.fetch,
        _convert=row.convert,
        _facts=asdict(facts),
    )


def _facts_of(kept: Mapping[str, Any]) -> _Facts:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}
    return _Facts(**values)


def _library(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"backbone {name!r} needs {module}: run `pip install fewshot-studio[more-backbones]`"
        ) from error


def _dim_of(module: nn.Module, image_size: int) -> int:
    """Length of a feature vector; on the meta device this costs no arithmetic."""
    import torch

    with torch.no_grad():
        features: Tensor = module.eval()(torch.zeros(1, 3, image_size, image_size, device="meta"))
    return features.shape[1]


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _resampling(said: str) -> Resampling:
    return "bilinear" if said == "bilinear" else "bicubic"


@dataclass(frozen=True)
class _Timm:
    """A model of timm's (Wightman 2019) up to its pooled features, DINOv2's (Oquab et al. 2023) among them."""

    name: str
    model: str

    def build(self) -> nn.Module:
        timm = _library("timm", self.name)
        try:
            network: nn.Module = timm.create_model(self.model, pretrained=False, num_classes=0)
        except RuntimeError as error:
            raise ConfigError(f"timm has no model {self.model!r}: {error}") from error
        return network

    def facts(self) -> _Facts:
        import torch

        with torch.device("meta"):
            network = self.build()
        config: dict[str, Any] = _library("timm.data", self.name).resolve_data_config(model=network)
        image_size = int(config["input_size"][-1])
        of_weights: dict[str, Any] = getattr(network, "pretrained_cfg", {})
        hub = of_weights.get("hf_hub_id")
        return _Facts(
            dim=_dim_of(network, image_size),
            image_size=image_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop=float(config["crop_pct"]),
            resampling=_resampling(config["interpolation"]),
            licence=of_weights.get("license") or f"see {of_weights.get('origin_url') or hub or 'its authors'}",
            source=f"{hub} on the Hugging Face hub" if hub else str(of_weights.get("url") or "no hub"),
        )

    def fetch(self, folder: Path, say: Say) -> Path:
        timm = _library("timm", self.name)
        config = timm.get_pretrained_cfg(self.model)
        if config is not None and config.hf_hub_id:
            say(f"fetching {config.hf_hub_id} from the Hugging Face hub")
            names = [config.hf_hub_filename] if config.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
            return weights.download_from_hub(config.hf_hub_id, names, folder)
        if config is not None and config.url:
            return weights.download(config.url, folder, say=say)
        raise WeightsMissing(f"timm knows no weights for {self.model}; name them, as in resnet18.a1_in1k")

    def convert(self, module: nn.Module, file: Path) -> Mapping[str, Tensor]:
        tensors: Mapping[str, Tensor] = weights.read_state_dict(file)
        # Each architecture's module knows its original authors' names.
        theirs = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        if theirs is not None:
            tensors = theirs(dict(tensors), module)
        heads = getattr(module, "pretrained_cfg", {}).get("classifier") or ()
        heads = (heads,) if isinstance(heads, str) else tuple(heads)
        return {
            name: tensor for name, tensor in tensors.items() if not name.startswith(tuple(f"{head}." for head in heads))
        }


@dataclass(frozen=True)
class _OpenClip:
    """The image tower of one of open_clip's models (Radford et al. 2021; Ilharco et al. 2021)."""

    name: str
    model: str

    def build(self) -> nn.Module:
        tower: nn.Module = self._whole().visual
        return tower

    def facts(self) -> _Facts:
        import torch

        with torch.device("meta"):
            tower = self._whole("meta").visual
        known = self._known()
        config: dict[str, Any] = {
            **tower.preprocess_cfg,
            **{key: known[key] for key in ("mean", "std") if key in known},
        }
        size = config["size"]
        image_size = int(size if isinstance(size, int) else size[0])
        hub = str(known.get("hf_hub") or "").rstrip("/")
        return _Facts(
            dim=_dim_of(tower, image_size),
            image_size=image_size,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            crop=1.0,
            resampling=_resampling(config["interpolation"]),
            licence=f"see {hub or known.get('url') or 'its authors'}",
            source=f"{hub} on the Hugging Face hub" if hub else str(known.get("url") or "no hub"),
        )

    def fetch(self, folder: Path, say: Say) -> Path:
        known = self._known()
        if hub := known.get("hf_hub"):
            repository, _, name = hub.rpartition("/")
            say(f"fetching {repository} from the Hugging Face hub")
            names = [name] if name else ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
            return weights.download_from_hub(repository, names, folder)
        if url := known.get("url"):
            return weights.download(url, folder, say=say)
        architecture, tag = self._parts()
        tags = ", ".join(_library("open_clip", self.name).list_pretrained_tags_by_model(architecture)) or "none"
        raise WeightsMissing(f"open_clip knows no weights {tag!r} for {architecture}, only {tags}")

    def convert(self, module: nn.Module, file: Path) -> Mapping[str, Tensor]:
        whole = self._whole()
        open_clip = _library("open_clip", self.name)
        weights.read_state_dict(file)  # that it can be read at all is said in our words
        try:
            open_clip.load_checkpoint(whole, str(file), strict=True, weights_only=True)
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(f"the tensors in {file.name} do not fit {self.name}: {error}") from error
        tensors: Mapping[str, Tensor] = whole.visual.state_dict()
        return tensors

    def _whole(self, device: str = "cpu") -> Any:
        open_clip = _library("open_clip", self.name)
        architecture, _ = self._parts()
        if architecture not in open_clip.list_models():
            raise ConfigError(f"open_clip has no architecture {architecture!r}")
        with _without_warnings():  # that nothing pretrained was loaded: the weights follow
            return open_clip.create_model(
                architecture,
                device=device,
                load_weights=False,
                pretrained_text=False,
                force_quick_gelu=bool(self._known().get("quick_gelu")),
            )

    def _known(self) -> dict[str, Any]:
        known: dict[str, Any] = _library("open_clip.pretrained", self.name).get_pretrained_cfg(*self._parts())
        return known

    def _parts(self) -> tuple[str, str]:
        architecture, _, tag = self.model.partition("/")
        if not architecture or not tag:
            raise ConfigError(f"backbone {self.name!r} lacks its weights: write open_clip:ARCHITECTURE/PRETRAINED")
        return architecture, tag
