"""Pictures to embeddings: ONNX Runtime on a CPU, compiled bf16 torch on a GPU.

The ONNX file is made once from the torch module, by a process of its own, and kept; a process that only embeds never
imports torch, so it starts in a second and stays small.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewshot_engine.backbones import BACKBONES, Backbone, get_backbone
from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.errors import CheckpointError, ConfigError, EngineError, ImageRefused, WeightsMissing
from fewshot_engine.images import decode

if TYPE_CHECKING:
    from torch import nn

UInt8Array = npt.NDArray[np.uint8]
Float32Array = npt.NDArray[np.float32]

CPU_BATCH = 16
GPU_BATCH = 128


def preprocess(image: Image.Image, size: int) -> UInt8Array:
    """The square that a backbone sees, (size, size, 3): the shorter side scaled to `size`, then the centre cut out.

    Squeezing the whole picture into the square costs 5 points at 1 shot where photos are not square (clothing, Lite0,
    cosine: 59.1 against 64.4; padded to a square 61.4), for the weights never saw squeezed things; on square ones
    (grocery, 79.9) it is all the same. Bicubic gains nothing over bilinear.

    Args:
        image: mode RGB.
    """
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    # The crop travels with the resize, so that nothing outside of it is computed.
    square = image.resize(
        (size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side), reducing_gap=2.0
    )
    return np.asarray(square, dtype=np.uint8)


class Encoder:
    """A backbone ready to embed on this machine; safe to share between threads.

    Attributes:
        name: of the backbone, or of the checkpoint's folder.
        dim: length of an embedding.
        image_size: side of the square that `encode` takes, in pixels.
        batch_size: how many pictures go through at once.
    """

    def __init__(
        self,
        name: str,
        *,
        dim: int,
        image_size: int,
        forward: Callable[[UInt8Array], Float32Array],
        batch_size: int = CPU_BATCH,
    ) -> None:
        self.name = name
        self.dim = dim
        self.image_size = image_size
        self.batch_size = batch_size
        self._forward = forward

    def encode(self, pixels: UInt8Array) -> Float32Array:
        """Pooled features, not normalised.

        Args:
            pixels: (n, image_size, image_size, 3), as `preprocess` makes them; n may be 0.

        Returns:
            (n, dim).
        """
        expected = (self.image_size, self.image_size, 3)
        if pixels.ndim != 4 or pixels.shape[1:] != expected or pixels.dtype != np.uint8:
            raise ValueError(f"pixels are {pixels.dtype} {pixels.shape}: {self.name} takes uint8 (n, {expected})")
        embeddings = np.empty((len(pixels), self.dim), dtype=np.float32)
        for start in range(0, len(pixels), self.batch_size):
            batch = pixels[start : start + self.batch_size]
            embeddings[start : start + len(batch)] = self._forward(batch)
        return embeddings

    def encode_images(self, images: Sequence[Image.Image]) -> Float32Array:
        """`preprocess`, then `encode`; (n, dim)."""
        if not images:
            return np.empty((0, self.dim), dtype=np.float32)
        return self.encode(np.stack([preprocess(image, self.image_size) for image in images]))


def load_encoder(name_or_checkpoint: str, *, cache_dir: Path, threads: int = 0, device: str | None = None) -> Encoder:
    """A built-in encoder by its name, or the one in a checkpoint folder that training made, of either kind.

    Args:
        cache_dir: where exported ONNX files are kept; made when missing.
        threads: cores for one forward pass on the CPU; 0 takes all of them.
        device: "cpu", "cuda", "cuda:1"…; None takes a GPU where there is one.

    Raises:
        ConfigError: neither a known name nor a folder.
        CheckpointError: the folder holds no encoder that can be read.
        WeightsMissing: the package with the pretrained weights is not installed.
    """
    recipe = _read_recipe(name_or_checkpoint)
    if recipe.adapted is not None:
        return _adapted(recipe, cache_dir=cache_dir, threads=threads, device=device)
    device = device or _default_device()
    if device != "cpu":
        forward, batch_size = _torch_forward(recipe, device), GPU_BATCH
    else:
        forward, batch_size = _onnx_forward(_cached_onnx(recipe, cache_dir), threads), CPU_BATCH
    return Encoder(
        recipe.name,
        dim=recipe.backbone.dim(recipe.image_size),
        image_size=recipe.image_size,
        forward=forward,
        batch_size=batch_size,
    )


def export_onnx(module: nn.Module, path: Path, image_size: int, *, backbone: Backbone | None = None) -> None:
    """Write `module` as ONNX that takes uint8 (n, image_size, image_size, 3) and gives float32 (n, dim), atomically.

    Args:
        module: maps normalised (n, 3, image_size, image_size) to (n, dim); its mode is left as it was.
        backbone: whose normalisation goes into the graph; None for a module that takes pixels from 0 to 1.
    """
    import torch

    normalised = _with_normalisation(module, backbone)
    was_training = module.training
    normalised.eval()
    example = torch.zeros(1, image_size, image_size, 3, dtype=torch.uint8, device=next(module.parameters()).device)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        with warnings.catch_warnings():  # the older exporter warns; the newer one would need onnxscript
            warnings.simplefilter("ignore")
            torch.onnx.export(
                normalised,
                (example,),
                temporary,
                input_names=["pixels"],
                output_names=["embeddings"],
                dynamic_axes={"pixels": {0: "n"}, "embeddings": {0: "n"}},
                opset_version=17,
                dynamo=False,
            )
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        module.train(was_training)


@dataclass(frozen=True)
class Embedded:
    """The outcome of one file: either an embedding, or why there is none."""

    index: int
    path: Path
    embedding: Float32Array | None
    refused: str | None = None


def embed_files(paths: Iterable[Path], encoder: Encoder, workers: int = 2) -> Iterator[Embedded]:
    """Embed photo files in the order given; a file that is no photo is reported, never raised.

    Each worker thread decodes a batch and sends it through the encoder, so decoding (Pillow releases the lock) goes on
    beside the forward passes of the others. On a CPU, an encoder loaded with `threads=1` and a worker for each core is
    the fastest: nobody waits for anybody.

    Args:
        workers: threads; about two batches for each are held in memory.
    """
    batches = _batches(enumerate(paths), encoder.batch_size)
    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="embed") as pool:
        pending: list[Future[list[Embedded]]] = []
        try:
            for batch in batches:
                pending.append(pool.submit(_embed_batch, batch, encoder))
                if len(pending) >= 2 * workers:
                    yield from pending.pop(0).result()
            while pending:
                yield from pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def _batches(items: Iterable[tuple[int, Path]], size: int) -> Iterator[list[tuple[int, Path]]]:
    batch: list[tuple[int, Path]] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _embed_batch(batch: list[tuple[int, Path]], encoder: Encoder) -> list[Embedded]:
    pixels = np.empty((len(batch), encoder.image_size, encoder.image_size, 3), dtype=np.uint8)
    refused: dict[int, str] = {}
    readable: list[int] = []
    for position, (_, path) in enumerate(batch):
        try:
            photo = decode(path, min_side=encoder.image_size)
        except ImageRefused as error:
            refused[position] = str(error)
        except OSError as error:
            refused[position] = f"The file cannot be opened: {error.strerror or error}."
        else:
            pixels[len(readable)] = preprocess(photo.rgb, encoder.image_size)
            readable.append(position)
    embeddings = dict(zip(readable, encoder.encode(pixels[: len(readable)]), strict=True))
    return [
        Embedded(index, path, embeddings.get(position), refused.get(position))
        for position, (index, path) in enumerate(batch)
    ]


@dataclass(frozen=True)
class _Recipe:
    """What has to be known to build an encoder: which backbone, at which size, with which weights."""

    source: str  # what was asked for: a name or a folder
    name: str
    backbone: Backbone
    image_size: int
    checkpoint: Path | None
    adapted: Path | None = None  # the folder of an *adapt* model: a map over this backbone's embeddings

    def weights_file(self) -> Path | None:
        if self.checkpoint is not None:
            return self.checkpoint / "model.safetensors"
        return self.backbone.weights() if self.backbone.weights else None

    def cache_name(self) -> str:
        digest = hashlib.sha256(f"{ENGINE_VERSION} {self.backbone.name} {self.image_size} ".encode())
        weights = self.weights_file()
        if weights is not None:
            with open(weights, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"{self.backbone.name}-{self.image_size}-{digest.hexdigest()[:16]}.onnx"

    def build(self) -> nn.Module:
        if self.checkpoint is None:
            return self.backbone.build(self.image_size).eval()
        from safetensors.torch import load_file

        module = self.backbone.build(self.image_size, pretrained=False)
        try:
            module.load_state_dict(load_file(self.checkpoint / "model.safetensors"))
        except Exception as error:  # safetensors has an exception of its own; torch raises RuntimeError
            raise CheckpointError(f"the weights of {self.checkpoint.name} do not fit {self.backbone.name}") from error
        return module.eval()


def _read_recipe(name_or_checkpoint: str) -> _Recipe:
    if name_or_checkpoint in BACKBONES:
        backbone = BACKBONES[name_or_checkpoint]
        if not backbone.pretrained:
            raise ConfigError(f"{backbone.name} has no weights of its own: train it first, then name the checkpoint")
        return _Recipe(name_or_checkpoint, backbone.name, backbone, backbone.image_size, None)
    folder = Path(name_or_checkpoint)
    if not folder.is_dir():
        known = ", ".join(name for name, backbone in BACKBONES.items() if backbone.pretrained)
        raise ConfigError(f"encoder {name_or_checkpoint!r} is neither one of {known} nor a checkpoint folder")
    try:
        described: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        kind, name, image_size = described["kind"], str(described["backbone"]), int(described["image_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name} is no checkpoint: its model.json is missing or cannot be read") from error
    if kind == "adapt":
        backbone = get_backbone(name)
        return _Recipe(name_or_checkpoint, folder.name, backbone, backbone.image_size, None, adapted=folder)
    if kind != "full":
        raise CheckpointError(f"{folder.name} holds a model of the kind {kind!r}: an encoder is adapt or full")
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder.name} is no complete checkpoint: model.safetensors is missing")
    return _Recipe(name_or_checkpoint, folder.name, get_backbone(name), image_size, folder)


def _adapted(recipe: _Recipe, *, cache_dir: Path, threads: int, device: str | None) -> Encoder:
    """The frozen backbone, followed by the map of an *adapt* model."""
    from fewshot_engine.recipes import load_recipe

    if recipe.adapted is None:
        raise ValueError(f"{recipe.name} is no adapted model")
    adaptation = load_recipe(recipe.adapted)
    frozen = load_encoder(recipe.backbone.name, cache_dir=cache_dir, threads=threads, device=device)
    return Encoder(
        recipe.name,
        dim=adaptation.map.shape[1],
        image_size=frozen.image_size,
        forward=lambda pixels: adaptation.apply(frozen.encode(pixels)),
        batch_size=frozen.batch_size,
    )


def _default_device() -> str:
    if not Path("/dev/nvidia0").exists():  # asked of the file system first: importing torch costs seconds
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _cached_onnx(recipe: _Recipe, cache_dir: Path) -> Path:
    path = cache_dir / recipe.cache_name()
    if path.is_file():
        return path
    if "torch" in sys.modules:
        with _export_lock:
            if not path.is_file():
                _export_recipe(recipe, path)
        return path
    # In a process of its own, so that this one need not carry torch for the rest of its life.
    command = [sys.executable, "-m", "fewshot_engine.encoder", recipe.source, str(path)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)  # noqa: S603
    if done.returncode == 2:
        raise CheckpointError(done.stderr.strip()) if recipe.checkpoint else WeightsMissing(done.stderr.strip())
    if done.returncode != 0:
        raise EngineError(f"{recipe.name} could not be exported to ONNX: {done.stderr.strip()[-2000:]}")
    return path


_export_lock = threading.Lock()  # torch's exporter keeps its state in globals; other processes have their own


def _export_recipe(recipe: _Recipe, path: Path) -> None:
    export_onnx(recipe.build(), path, recipe.image_size, backbone=recipe.backbone)


def _onnx_forward(path: Path, threads: int) -> Callable[[UInt8Array], Float32Array]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or (os.cpu_count() or 1)
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin would take the cores that decoding and the site need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(pixels: UInt8Array) -> Float32Array:
        (embeddings,) = session.run(None, {"pixels": np.ascontiguousarray(pixels)})
        return np.asarray(embeddings, dtype=np.float32)

    return forward


def _torch_forward(recipe: _Recipe, device: str) -> Callable[[UInt8Array], Float32Array]:
    import torch

    module = _with_normalisation(recipe.build(), recipe.backbone).to(device)
    module = module.to(memory_format=torch.channels_last)
    compiled = torch.compile(module)

    @torch.inference_mode()
    def forward(pixels: UInt8Array) -> Float32Array:
        # Every batch has the same size, padded with black: a new size would be compiled anew.
        padded = torch.zeros((GPU_BATCH, *pixels.shape[1:]), dtype=torch.uint8)
        padded[: len(pixels)] = torch.from_numpy(np.ascontiguousarray(pixels))
        with torch.autocast("cuda", dtype=torch.bfloat16):
            embeddings = compiled(padded.to(device, non_blocking=True))
        values: Float32Array = embeddings[: len(pixels)].float().cpu().numpy()
        return values

    return forward


def _with_normalisation(module: nn.Module, backbone: Backbone | None) -> nn.Module:
    """uint8 (n, h, w, 3) in front of a module that takes normalised (n, 3, h, w)."""
    import torch
    from torch import Tensor, nn

    mean, std = (backbone.mean, backbone.std) if backbone else ((0.0,) * 3, (1.0,) * 3)

    class Normalised(nn.Module):
        scale: Tensor
        shift: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.inner = module
            scale = 1 / (255 * torch.tensor(std))
            self.register_buffer("scale", scale.view(3, 1, 1))
            self.register_buffer("shift", (-torch.tensor(mean) * 255 * scale).view(3, 1, 1))

        def forward(self, pixels: Tensor) -> Tensor:
            x = pixels.permute(0, 3, 1, 2).float()
            features: Tensor = self.inner(x * self.scale + self.shift)
            return features

    return Normalised().to(next(module.parameters()).device)


def _main(source: str, path: str) -> int:
    try:
        _export_recipe(_read_recipe(source), Path(path))
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
