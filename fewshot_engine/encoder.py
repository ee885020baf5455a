"""Pictures to embeddings: ONNX Runtime on a CPU, compiled fp16 torch on a GPU; one backbone, or several fused.

A photo becomes a row: the squares that the backbones are shown of it, packed one after another. Rows are stacked and
encoded the same way whatever the encoder is made of.

The ONNX file is made once from the torch module, by a process of its own, and kept; a process that only embeds never
imports torch, so it starts in a second and stays small.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewshot_engine.apart import answer, run_apart
from fewshot_engine.backbones import BACKBONES, EXTRA_PREFIXES, Backbone, Resampling, get_backbone
from fewshot_engine.config import ENCODERS, ENGINE_VERSION
from fewshot_engine.errors import CheckpointError, ConfigError, ImageRefused, WeightsMissing
from fewshot_engine.framing import WHOLE, Square, UInt8Array, View, read_view, read_views
from fewshot_engine.images import decode
from fewshot_engine.known_classes import KnownClasses, load_known_classes
from fewshot_engine.prototypes import Rule, l2_normalise
from fewshot_engine.recipes import Recipe, load_recipe
from fewshot_engine.weights import sha256_of

if TYPE_CHECKING:
    from torch import nn

Float32Array = npt.NDArray[np.float32]
Forward = Callable[[UInt8Array], Float32Array]

CPU_BATCH = 8  # small, so that the last of a folder are shared among the threads
# What ONNX Runtime is given at once: more activations than fit the cache cost a quarter of the speed. Processor time of
# a photo in runs of 1, 2, 4, 8, 16: Lite0 4.2, 4.4, 4.6, 5.1, 5.5 ms; Lite2 10.0, 9.8, 10.6, 12.4, 13.6 ms.
SQUARES_A_THREAD = 2
GPU_BATCH = 128
# Photos on a GPU. Compiling the accurate encoder takes 44 s of an H100's time, and saves 0.3 ms a photo afterwards.
COMPILE_AFTER = 150_000


def fuse(parts: Sequence[Float32Array]) -> Float32Array:
    """Embeddings of the same photos under several backbones as one: each L2-normalised, side by side.

    The result is scaled to length 1, so that every backbone has the same say in a cosine and in a distance, and a fused
    embedding compares with any other of length 1.

    Args:
        parts: (n, d_i) each, of any length.

    Returns:
        (n, sum of d_i).
    """
    fused: Float32Array = np.concatenate([l2_normalise(part) for part in parts], axis=1)
    return fused / np.float32(math.sqrt(len(parts)))


def average_views(parts: Sequence[Float32Array]) -> Float32Array:
    """Embeddings of several views of the same photos as one: the mean of the L2-normalised ones.

    Args:
        parts: (n, dim) each.
    """
    mean: Float32Array = np.mean([l2_normalise(part) for part in parts], axis=0, dtype=np.float32)
    return mean


class Encoder:
    """One backbone or several, ready to embed on this machine; safe to share between threads.

    Attributes:
        name: as it was asked for, or of the checkpoint's folder.
        dim: length of an embedding.
        squares: what is shown of each photo, in the order of a row.
        batch_size: how many photos go through at once.
        input_shape: of a row: (size, size, 3) for a single square, (bytes,) for several.
        needs_side: the shorter side that a photo should be decoded at, in pixels.
        image_size: side of the largest square, in pixels.
        rule: by which label sets on its embeddings answer, unless something is known to do better.
    """

    def __init__(
        self,
        name: str,
        *,
        dim: int,
        squares: Sequence[Square],
        forward: Forward,
        batch_size: int = CPU_BATCH,
        rule: Rule | None = None,
        known_classes: Callable[[], KnownClasses | None] = lambda: None,
    ) -> None:
        self.name = name
        self.rule = rule or Rule()
        self._known_classes = known_classes
        self.dim = dim
        self.squares = tuple(squares)
        self.batch_size = batch_size
        self._forward = forward
        self.needs_side = max(square.needs_side for square in squares)
        self.image_size = max(square.size for square in squares)
        single = squares[0].size if len(squares) == 1 else None
        bytes_a_row = sum(3 * square.size**2 for square in squares)
        self.input_shape: tuple[int, ...] = (single, single, 3) if single else (bytes_a_row,)

    def prepare(self, image: Image.Image) -> UInt8Array:
        """A photo as a row for `encode`, of `input_shape`; decode it with `min_side=needs_side`.

        Args:
            image: mode RGB.
        """
        if len(self.squares) == 1:
            return self.squares[0].cut(image)
        return np.concatenate([square.cut(image).reshape(-1) for square in self.squares])

    def encode(self, rows: UInt8Array) -> Float32Array:
        """Embeddings of prepared photos, (n, dim).

        One backbone that sees one view gives its pooled features as they are, not normalised. Several views are the
        mean of their normalised features (`average_views`), several backbones are fused to length 1 (`fuse`).

        Args:
            rows: (n, *input_shape), as `prepare` makes them; n may be 0.
        """
        if rows.shape[1:] != self.input_shape or rows.dtype != np.uint8:
            raise ValueError(f"rows are {rows.dtype} {rows.shape}: {self.name} takes uint8 (n, *{self.input_shape})")
        embeddings = np.empty((len(rows), self.dim), dtype=np.float32)
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            embeddings[start : start + len(batch)] = self._forward(batch)
        return embeddings

    def likeness(self, embeddings: Float32Array) -> Float32Array | None:
        """What the classes that each photo resembles look like, for `inference.fit`; None where no class is known.

        Args:
            embeddings: (n, dim), as `encode` gives them.

        Returns:
            (n, dim), see `KnownClasses.likeness`.
        """
        known = self._known_classes()
        return None if known is None else known.likeness(embeddings)

    def encode_images(self, images: Sequence[Image.Image]) -> Float32Array:
        """`prepare`, then `encode`; (n, dim)."""
        if not images:
            return np.empty((0, self.dim), dtype=np.float32)
        return self.encode(np.stack([self.prepare(image) for image in images]))


def load_encoder(
    name_or_checkpoint: str,
    *,
    cache_dir: Path,
    threads: int = 0,
    device: str | None = None,
    views: Sequence[str] = ("whole",),
) -> Encoder:
    """An encoder by its name ("accurate", "fast" or a backbone's), or the one in a checkpoint folder of either kind.

    One of the kind *adapt* takes every photo to be of the kind that it was adapted to; see `load_with_recipe`.

    Args:
        cache_dir: where exported ONNX files are kept; made when missing.
        threads: cores for one forward pass on the CPU; 0 takes all of them.
        device: "cpu", "cuda", "cuda:1"…; None takes a GPU where there is one.
        views: of each photo, averaged: "whole" is the centre square (or how the backbone frames photos, see
            `config.ENCODERS`), "mirror" that square mirrored, "crop" a tighter one (80 % of it, or as "crop:0.65"
            says), "corners" the four crops of that tightness in the corners, "pad" the whole photo between two bars.

    Raises:
        ConfigError: neither a known name nor a folder, or no such view.
        CheckpointError: the folder holds no encoder that can be read.
        WeightsMissing: the pretrained weights are not on this machine.
    """
    frozen, recipe = load_with_recipe(
        name_or_checkpoint, cache_dir=cache_dir, threads=threads, device=device, views=views
    )
    if recipe is None:
        return frozen
    return Encoder(
        frozen.name,
        dim=recipe.apply(np.ones((1, frozen.dim), dtype=np.float32)).shape[1],
        squares=frozen.squares,
        forward=lambda rows: recipe.apply(frozen.encode(rows)),
        batch_size=frozen.batch_size,
    )


def load_with_recipe(
    name_or_checkpoint: str,
    *,
    cache_dir: Path,
    threads: int = 0,
    device: str | None = None,
    views: Sequence[str] = ("whole",),
) -> tuple[Encoder, Recipe | None]:
    """As `load_encoder`, but what an *adapt* model makes of the frozen encoder's embeddings is left to the caller.

    That is for whoever has a set of photos at hand: `Recipe.familiarity` is asked of all of them, and holds for all.
    """
    plan = read_plan(name_or_checkpoint)
    encoder = _load(plan, cache_dir, threads, device, views)
    return encoder, None if plan.adapted is None else load_recipe(plan.adapted)


def _load(plan: Plan, cache_dir: Path, threads: int, device: str | None, views: Sequence[str]) -> Encoder:
    shown = read_views(views)
    device = device or _default_device()
    forwards = [
        _torch_forward(member, device) if device != "cpu" else _onnx_forward(member.onnx(cache_dir), threads)
        for member in plan.members
    ]
    return Encoder(
        plan.name,
        dim=sum(member.dim for member in plan.members),
        squares=[square for member in plan.members for square in member.squares(shown)],
        forward=_fused_forward(plan.members, forwards, shown),
        batch_size=CPU_BATCH if device == "cpu" else GPU_BATCH,
        rule=Rule.usual(is_full=any(member.is_full for member in plan.members)),
        known_classes=lambda: load_known_classes([member.source for member in plan.members], cache_dir),
    )


def load_untrained(
    checkpoint: str,
    *,
    cache_dir: Path,
    threads: int = 0,
    device: str | None = None,
    views: Sequence[str] = ("whole",),
) -> Encoder | None:
    """The network of a *full* model as it was before any training, at the model's image size; None for anything else.

    That is its pretrained weights, or the random ones of the run's seed; a model that it was tuned from is training,
    too. Imports torch. Arguments and errors are those of `load_encoder`.
    """
    plan = read_plan(checkpoint)
    trained = next((member for member in plan.members if member.checkpoint is not None), None)
    if trained is None or trained.checkpoint is None:
        return None
    import torch  # noqa: F401 - so that the network is made in this process, for no other knows of it by name

    described = json.loads((trained.checkpoint / "model.json").read_text(encoding="utf-8"))
    seed = int(described.get("config", {}).get("seed", 0))
    member = replace(trained, checkpoint=None, seed=seed)
    return _load(Plan(f"{plan.name}, untrained", (member,)), cache_dir, threads, device, views)


def export_onnx(module: nn.Module, path: Path, image_size: int, *, backbone: Backbone | None = None) -> None:
    """Write `module` as ONNX that takes uint8 (n, image_size, image_size, 3) and gives float32 (n, dim), atomically.

    Args:
        module: maps normalised (n, 3, image_size, image_size) to (n, dim); its mode is left as it was.
        backbone: whose normalisation goes into the graph; None for a module that takes pixels from 0 to 1.
    """
    was_training = module.training
    try:
        write_onnx(with_normalisation(module, backbone).eval(), path, {"pixels": image_size})
    finally:
        module.train(was_training)


def write_onnx(module: nn.Module, path: Path, inputs: Mapping[str, int]) -> None:
    """Write a module in evaluation mode as ONNX with the output "embeddings", (n, dim), atomically.

    Args:
        module: takes uint8 (n, side, side, 3) for each input, in order.
        inputs: name -> side, in pixels.
    """
    import torch

    device = next(module.parameters()).device
    examples = tuple(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=device) for side in inputs.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    os.close(handle)
    try:
        with _export_lock, warnings.catch_warnings():  # the older exporter warns; the newer one would need onnxscript
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                examples,
                temporary,
                input_names=list(inputs),
                output_names=["embeddings"],
                dynamic_axes={name: {0: "n"} for name in [*inputs, "embeddings"]},
                opset_version=17,
                dynamo=False,
            )
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


_export_lock = threading.Lock()  # torch's exporter keeps its state in globals; other processes have their own


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
    rows = np.empty((len(batch), *encoder.input_shape), dtype=np.uint8)
    refused: dict[int, str] = {}
    readable: list[int] = []
    for position, (_, path) in enumerate(batch):
        try:
            photo = decode(path, min_side=encoder.needs_side)
        except ImageRefused as error:
            refused[position] = str(error)
        except OSError as error:
            refused[position] = f"The file cannot be opened: {error.strerror or error}."
        else:
            rows[len(readable)] = encoder.prepare(photo.rgb)
            readable.append(position)
    embeddings = dict(zip(readable, encoder.encode(rows[: len(readable)]), strict=True))
    return [
        Embedded(index, path, embeddings.get(position), refused.get(position))
        for position, (index, path) in enumerate(batch)
    ]


_making_lock = threading.Lock()  # threads that want the same file wait for the first of them


@dataclass(frozen=True)
class Member:
    """One backbone of an encoder: at which size, with which weights, and how it frames a photo unless told."""

    source: str  # a backbone's name or a checkpoint's folder: how another process finds it
    backbone: Backbone
    image_size: int
    checkpoint: Path | None = None
    framing: View = WHOLE
    seed: int | None = None  # of a *full* model's network, before any training

    @property
    def is_full(self) -> bool:
        """Is it the network of a *full* model, trained or not yet?"""
        return self.checkpoint is not None or self.seed is not None

    @property
    def dim(self) -> int:
        return self.backbone.dim(self.image_size)

    def squares(self, views: Sequence[View]) -> list[Square]:
        """What it is shown: as its pretrained weights were tested; a model trained here sees what training cut out."""
        crop, resampling = self.backbone.crop, self.backbone.resampling
        if self.is_full:
            crop, resampling = 1.0, "bilinear"
        return [self._square(view, crop, resampling) for view in views]

    def _square(self, view: View, crop: float, resampling: Resampling) -> Square:
        frame = view if view.is_framing else self.framing
        share = crop * frame.share
        return Square(
            self.image_size, share, frame.across, frame.down, view.mirrored, frame.padded, resampling=resampling
        )

    def build(self) -> nn.Module:
        if self.checkpoint is None:
            import torch

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed or 0)
                return self.backbone.build(self.image_size).eval()
        from safetensors.torch import load_file

        module = self.backbone.build(self.image_size, pretrained=False)
        try:
            module.load_state_dict(load_file(self.checkpoint / "model.safetensors"))
        except Exception as error:  # safetensors has an exception of its own; torch raises RuntimeError
            raise CheckpointError(f"the weights of {self.checkpoint.name} do not fit {self.backbone.name}") from error
        return module.eval()

    def onnx(self, cache_dir: Path) -> Path:
        """The exported file, made when it is not there yet."""
        path = cache_dir / self._cache_name()
        if path.is_file():
            return path
        if "torch" in sys.modules:
            with _making_lock:
                if not path.is_file():
                    self.export(path)
            return path
        refusal = CheckpointError if self.checkpoint else WeightsMissing
        run_apart(
            "fewshot_engine.encoder", self.source, str(path), what=f"the ONNX file of {self.source}", refusal=refusal
        )
        return path

    def export(self, path: Path) -> None:
        export_onnx(self.build(), path, self.image_size, backbone=self.backbone)

    def _cache_name(self) -> str:
        digest = hashlib.sha256(f"{ENGINE_VERSION} {self.backbone.name} {self.image_size} ".encode())
        if self.checkpoint is None and not self.backbone.pretrained:
            digest.update(f"random, seed {self.seed}".encode())
        else:
            file = self.checkpoint / "model.safetensors" if self.checkpoint is not None else self.backbone.weights()
            digest.update(bytes.fromhex(sha256_of(file)))
        return f"{quote(self.backbone.name, safe='')}-{self.image_size}-{digest.hexdigest()[:16]}.onnx"


@dataclass(frozen=True)
class Plan:
    """What an encoder is made of; `adapted` is the folder of a map over the members' embeddings."""

    name: str
    members: tuple[Member, ...]
    adapted: Path | None = None


def read_plan(name_or_checkpoint: str) -> Plan:
    """Which backbones make the encoder of this name or checkpoint folder; raises as `load_encoder` does."""
    if name_or_checkpoint in ENCODERS:
        return Plan(name_or_checkpoint, tuple(map(_pretrained, ENCODERS[name_or_checkpoint])))
    if name_or_checkpoint.partition("@")[0] in BACKBONES or name_or_checkpoint.startswith(EXTRA_PREFIXES):
        return Plan(name_or_checkpoint, (_pretrained(name_or_checkpoint),))
    folder = Path(name_or_checkpoint)
    if not folder.is_dir():
        known = ", ".join([*ENCODERS, *(name for name, backbone in BACKBONES.items() if backbone.pretrained)])
        raise ConfigError(f"encoder {name_or_checkpoint!r} is neither one of {known} nor a checkpoint folder")
    try:
        described: dict[str, Any] = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        kind, name = described["kind"], str(described["backbone"])
        image_size = int(described["image_size"]) if kind == "full" else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder.name} is no checkpoint: its model.json is missing or cannot be read") from error
    if kind == "adapt":
        return Plan(folder.name, read_plan(name).members, adapted=folder)
    if kind != "full":
        raise CheckpointError(f"{folder.name} holds a model of the kind {kind!r}: an encoder is adapt or full")
    if not (folder / "model.safetensors").is_file():
        raise CheckpointError(f"{folder.name} is no complete checkpoint: model.safetensors is missing")
    return Plan(folder.name, (Member(name_or_checkpoint, get_backbone(name), image_size, folder),))


def _pretrained(name: str) -> Member:
    """Of a backbone's name, followed by @ and a view where it is to frame photos in a way of its own."""
    name, _, view = name.partition("@")
    backbone = get_backbone(name)
    if not backbone.pretrained:
        raise ConfigError(f"{name} has no weights of its own: train it first, then name the checkpoint")
    framings = read_view(view or "whole")
    if len(framings) > 1:
        raise ConfigError(f"{name}@{view} shows {len(framings)} squares: a backbone frames a photo in one way")
    return Member(name, backbone, backbone.image_size, framing=framings[0])


def _fused_forward(members: Sequence[Member], forwards: Sequence[Forward], views: Sequence[View]) -> Forward:
    """Rows, (n, *input_shape) -> (n, dim): each member sees its squares of a row, all views in one go."""
    shapes = [(len(views), member.image_size, member.image_size, 3) for member in members]
    ends = np.cumsum([math.prod(shape) for shape in shapes])

    def forward(rows: UInt8Array) -> Float32Array:
        n = len(rows)
        parts = []
        for run, shape, packed in zip(forwards, shapes, np.split(rows.reshape(n, -1), ends[:-1], axis=1), strict=True):
            squares = np.swapaxes(packed.reshape(n, *shape), 0, 1)  # (views, n, size, size, 3)
            features = run(squares.reshape(-1, *shape[1:])).reshape(len(views), n, -1)
            parts.append(features[0] if len(views) == 1 else average_views(list(features)))
        return parts[0] if len(parts) == 1 else fuse(parts)

    return forward


def _default_device() -> str:
    if not Path("/dev/nvidia0").exists():  # asked of the file system first: importing torch costs seconds
        return "cpu"
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _onnx_forward(path: Path, threads: int) -> Forward:
    import onnxruntime

    threads = threads or os.cpu_count() or 1
    at_once = SQUARES_A_THREAD * threads
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Idle threads that spin would take the cores that decoding and the site need.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def forward(pixels: UInt8Array) -> Float32Array:
        parts = [pixels[start : start + at_once] for start in range(0, len(pixels), at_once)]
        return np.concatenate([session.run(None, {"pixels": np.ascontiguousarray(part)})[0] for part in parts])

    return forward


def _torch_forward(member: Member, device: str) -> Forward:
    import torch

    module = with_normalisation(member.build(), member.backbone).to(device)
    module = module.to(memory_format=torch.channels_last)
    # Members differ in size, and torch would take that for a size that changes while it runs.
    compiled = torch.compile(module, dynamic=False)
    seen = 0

    @torch.inference_mode()
    def run(pixels: UInt8Array) -> Float32Array:
        nonlocal seen
        embeddings = []
        for start in range(0, len(pixels), GPU_BATCH):
            batch = pixels[start : start + GPU_BATCH]
            seen += len(batch)
            is_compiled = seen > COMPILE_AFTER
            # Every compiled batch has the same size, padded with black: a new size would be compiled anew.
            sent = torch.zeros((GPU_BATCH if is_compiled else len(batch), *batch.shape[1:]), dtype=torch.uint8)
            sent[: len(batch)] = torch.from_numpy(np.ascontiguousarray(batch))
            sent = sent.to(device, non_blocking=True)
            # bfloat16 never overflows, but its cosines with the CPU's embeddings go down to 0.994.
            with torch.autocast("cuda", dtype=torch.float16):
                features = (compiled if is_compiled else module)(sent).float()
            if not torch.isfinite(features).all():
                features = module(sent).float()
            embeddings.append(features[: len(batch)])
        values: Float32Array = torch.cat(embeddings).cpu().numpy()
        return values

    return lambda pixels: _gpu_thread.submit(run, pixels).result()


# All compiled modules run in one thread: what is compiled in one is compiled again, for seconds, in every other.
_gpu_thread = ThreadPoolExecutor(1, thread_name_prefix="gpu")


def with_normalisation(module: nn.Module, backbone: Backbone | None) -> nn.Module:
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


def _main(source: str, path: str) -> None:
    (member,) = read_plan(source).members
    member.export(Path(path))


if __name__ == "__main__":
    answer(_main)
