"""A trained model to take away: one zip that ONNX Runtime can run without this engine, and that says what it is."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fewshot_engine.config import ENGINE_VERSION
from fewshot_engine.encoder import Encoder, Plan, load_encoder, read_plan, with_normalisation, write_onnx
from fewshot_engine.errors import EngineError
from fewshot_engine.recipes import CARD, WEIGHTS, load_recipe

if TYPE_CHECKING:
    from torch import nn

GRAPH, LICENCE, README = "model.onnx", "LICENCES.txt", "README.txt"
TOLERANCE = 1e-3  # of the largest value: what two orders of summing the same numbers may differ by

ABOUT = """{name}: a picture encoder exported by Fewshot Studio.

model.onnx takes uint8 pixels and gives an embedding of {dim} numbers a photo; all that lies between is in the graph.
model.json describes its inputs and how it was made. LICENCES.txt names the licences of the weights.
{adapted}
To run it: pip install onnxruntime pillow numpy, then, in this folder,

import json
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

def square(photo, side, share, padded, resampling):
    photo, how = ImageOps.exif_transpose(photo).convert("RGB"), Image.Resampling[resampling.upper()]
    if padded:  # all of the photo, between two bars of its mean colour
        size = [max(1, round(length * side / max(photo.size))) for length in photo.size]
        whole = np.asarray(photo.resize(size, how, reducing_gap=2.0))
        left, top = (side - size[0]) // 2, (side - size[1]) // 2
        pixels = np.empty((side, side, 3), np.uint8)
        pixels[:] = whole.mean(axis=(0, 1))
        pixels[top : top + size[1], left : left + size[0]] = whole
        return pixels
    cut = min(photo.size) * share
    left, top = (photo.width - cut) / 2, (photo.height - cut) / 2
    return np.asarray(photo.resize((side, side), how, box=(left, top, left + cut, top + cut), reducing_gap=2.0))

model = json.load(open("model.json"))
session = onnxruntime.InferenceSession("model.onnx")

def embed(photos):
    return session.run(None, {{
        one["name"]: np.stack([
            square(photo, one["side"], one["share"], one["padded"], one["resampling"]) for photo in photos
        ])
        for one in model["inputs"]
    }})[0]

embed([Image.open("photo.jpg")])  # (1, {dim})

Compare embeddings by their cosine: a label's prototype is the mean of its examples' embeddings, each scaled to length
1, and a new photo gets the label of the nearest prototype.
"""

ADAPTED = """\
It was adapted to one kind of photos, and takes every photo to be of that kind. recipe.safetensors holds the means of
the classes it was adapted to: for photos far from all of them, an encoder that was not adapted answers better.
"""


def write_bundle(name_or_checkpoint: str, out: Path, *, cache_dir: Path) -> dict[str, Any]:
    """Write the zip, after checking the graph in it against the encoder on random pixels.

    It holds model.onnx with all backbones, their fusion and an *adapt* model's map in one graph; model.json;
    recipe.safetensors (centre, basis, core, class means) where there is a map; LICENCES.txt; README.txt, which says how
    to run it.

    Returns:
        What model.json says.

    Raises: as `load_encoder` does, and
        EngineError: the graph gives other numbers than the encoder.
    """
    plan = read_plan(name_or_checkpoint)
    encoder = load_encoder(name_or_checkpoint, cache_dir=cache_dir, device="cpu")
    names = ["pixels"] if len(plan.members) == 1 else [f"pixels_{number + 1}" for number in range(len(plan.members))]
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / GRAPH
        sides = {name: member.image_size for name, member in zip(names, plan.members, strict=True)}
        write_onnx(_whole(plan), graph, sides)
        error = _check(graph, sides, encoder)
        described = _describe(plan, encoder, names, graph) | {"largest_difference": error}
        _write_zip(out, plan, described, graph)
    return described


def _whole(plan: Plan) -> nn.Module:
    """Backbones, fusion and map as one module: uint8 (n, side, side, 3) for each member -> (n, dim)."""
    import torch
    from torch import Tensor, nn
    from torch.nn.functional import normalize

    recipe = load_recipe(plan.adapted) if plan.adapted is not None else None

    class Whole(nn.Module):
        centre: Tensor
        basis: Tensor
        core: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(with_normalisation(member.build(), member.backbone) for member in plan.members)
            if recipe is not None:
                self.register_buffer("centre", torch.from_numpy(recipe.centre))
                self.register_buffer("basis", torch.from_numpy(recipe.basis))
                self.register_buffer("core", torch.from_numpy(recipe.core))

        def forward(self, *pixels: Tensor) -> Tensor:
            parts = [member(squares) for member, squares in zip(self.members, pixels, strict=True)]
            x: Tensor = parts[0]
            if len(parts) > 1:
                x = torch.cat([normalize(part, dim=1) for part in parts], dim=1) / math.sqrt(len(parts))
            if recipe is None:
                return x
            x = normalize(x, dim=1)
            z = x - self.centre
            adapted = normalize(z + z @ self.basis @ self.core @ self.basis.T, dim=1)
            return torch.cat([math.sqrt(1 - recipe.share) * x, math.sqrt(recipe.share) * adapted], dim=1)

    return Whole().eval()


def _check(graph: Path, sides: dict[str, int], encoder: Encoder) -> float:
    """The largest difference from the encoder, as a share of the largest value."""
    import onnxruntime

    rng = np.random.default_rng(0)
    squares = {name: rng.integers(0, 256, (2, side, side, 3), dtype=np.uint8) for name, side in sides.items()}
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (embeddings,) = session.run(None, squares)
    rows = np.concatenate([pixels.reshape(2, -1) for pixels in squares.values()], axis=1)
    expected = encoder.encode(rows.reshape(2, *encoder.input_shape))
    difference = float(np.abs(embeddings - expected).max() / np.abs(expected).max())
    if not difference < TOLERANCE:
        raise EngineError(f"the exported graph differs from {encoder.name} by {difference:.2%} of its largest value")
    return difference


def _describe(plan: Plan, encoder: Encoder, names: list[str], graph: Path) -> dict[str, Any]:
    with open(graph, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    folder = plan.adapted or plan.members[0].checkpoint
    return {
        "name": plan.name,
        "engine": ENGINE_VERSION,
        "dim": encoder.dim,
        "inputs": [
            {
                "name": name,
                "side": square.size,
                "share": square.share,
                "padded": square.padded,
                "resampling": square.resampling,
                "backbone": member.backbone.name,
                "licence": member.backbone.licence,
            }
            for name, square, member in zip(names, encoder.squares, plan.members, strict=True)
        ],
        "graph": "embeddings" if plan.adapted is None else "embeddings, frozen and adapted halves for familiar photos",
        "sha256": sha256,
        "card": json.loads((folder / CARD).read_text(encoding="utf-8")) if folder is not None else None,
    }


def _write_zip(out: Path, plan: Plan, described: dict[str, Any], graph: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    building = out.with_name(f".{out.name}.tmp")
    try:
        with zipfile.ZipFile(building, "w") as bundle:  # stored: weights do not compress
            bundle.write(graph, GRAPH)
            bundle.writestr(CARD, json.dumps(described, indent=2, ensure_ascii=False))
            if plan.adapted is not None:
                bundle.write(plan.adapted / WEIGHTS, "recipe.safetensors")
            bundle.writestr(LICENCE, _licences(plan))
            adapted = ADAPTED if plan.adapted is not None else ""
            bundle.writestr(README, ABOUT.format(name=plan.name, dim=described["dim"], adapted=adapted))
        building.replace(out)
    finally:
        building.unlink(missing_ok=True)


def _licences(plan: Plan) -> str:
    """A paragraph for each backbone, then the texts that their packages carry, each once."""
    said: list[str] = []
    texts: dict[str, str] = {}
    for backbone in (member.backbone for member in plan.members):
        origin = backbone.package or backbone.source or "trained from scratch"
        said.append(f"{backbone.title}\n  weights: {origin}\n  licence: {backbone.licence}\n")
        text = _licence_of_package(backbone.package) if backbone.package else ""
        if text:
            texts.setdefault(text, backbone.package)
    copies = [f"{'=' * 70}\nThe licence in the package {package}:\n\n{text}" for text, package in texts.items()]
    return "\n".join([*said, *copies])


def _licence_of_package(package: str) -> str:
    try:
        return importlib.metadata.distribution(package).read_text("LICENSE") or ""
    except importlib.metadata.PackageNotFoundError:
        return ""
