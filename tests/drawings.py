"""Drawn fruit and made-up letters: photos enough for the journeys, and for the picture in the README.

Real ones may not enter the repository, and the journeys have to work without them.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

FRUIT = ("Apple", "Lemon", "Pear", "Plum", "Orange")
SKINS = {
    "Apple": ((176, 30, 36), (150, 178, 60)),
    "Lemon": ((236, 200, 44), (226, 214, 90)),
    "Pear": ((170, 178, 66), (204, 180, 84)),
    "Plum": ((74, 40, 92), (104, 48, 88)),
    "Orange": ((232, 126, 28), (238, 148, 40)),
}
CLOTHS = ((214, 198, 172), (120, 132, 120), (92, 104, 126), (196, 204, 208), (150, 112, 84), (228, 222, 212))
LIGHT = np.array([-0.45, -0.6, 0.66])

Floats = NDArray[np.float64]


def fruit(kind: str, seed: int, *, size: int = 240) -> bytes:
    """A JPEG of one to three pieces of fruit on a cloth; the same kind and seed give the same bytes."""
    random = np.random.default_rng([FRUIT.index(kind), seed])
    canvas = _cloth(random, size)
    count = int(random.integers(1, 4))
    for n in range(count):
        radius = size * random.uniform(0.27, 0.33) / (1 if count == 1 else 1.35)
        angle = 2 * np.pi * (n / count) + random.uniform(0, 1)
        away = 0 if count == 1 else size * 0.21
        place = np.array([size / 2 + away * np.cos(angle), size / 2 + away * np.sin(angle)])
        _lay(canvas, kind, random, place + random.uniform(-0.05, 0.05, 2) * size, radius)
    out = io.BytesIO()
    Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=88)
    return out.getvalue()


def fruit_folder(root: Path, kinds: tuple[str, ...] = FRUIT, each: int = 8, *, first: int = 0) -> Path:
    """A folder of class folders of drawn fruit."""
    for kind in kinds:
        (root / kind).mkdir(parents=True, exist_ok=True)
        for n in range(first, first + each):
            (root / kind / f"{kind.lower()}-{n:02}.jpg").write_bytes(fruit(kind, n))
    return root


def _cloth(random: np.random.Generator, size: int) -> Floats:
    y, x = np.mgrid[0:size, 0:size] / size
    tint = np.array(CLOTHS[random.integers(len(CLOTHS))]) * random.uniform(0.85, 1.05)
    fold = 1 + 0.07 * np.sin(6 * x + 9 * y * random.uniform(-1, 1) + random.uniform(0, 6)) - 0.16 * (x * y)
    weave = random.normal(0, 0.018, (size, size))
    shaded: Floats = tint * (fold + weave)[..., None]
    return shaded


def _lay(canvas: Floats, kind: str, random: np.random.Generator, place: Floats, radius: float) -> None:
    """One piece: its shadow, its body in the light, its stem."""
    size = len(canvas)
    y, x = np.mgrid[0:size, 0:size].astype(float)
    turn = random.uniform(-0.5, 0.5)
    across, down = _turned(x - place[0], y - place[1], turn)
    edge = _outline(kind, np.arctan2(across, -down)) * radius
    reach = np.hypot(across, down) / edge  # 0 in the middle, 1 at the skin's edge
    shadow = np.hypot(x - place[0] - 0.16 * radius, (y - place[1] - 0.24 * radius) * 1.1) / (1.22 * radius)
    canvas *= 1 - 0.5 * np.clip(1.5 - 1.5 * shadow, 0, 0.9)[..., None]
    inside = np.clip((1 - reach) * radius / 1.5, 0, 1)[..., None]
    canvas += inside * (_skin(kind, random, x - place[0], y - place[1], reach, radius) - canvas)
    if kind in ("Apple", "Pear"):
        stem = (abs(across - 0.1 * down) < 0.045 * radius) & (down < -0.62 * radius) & (down > -1.3 * radius)
        canvas[stem] = (82, 58, 36)


def _skin(kind: str, random: np.random.Generator, x: Floats, y: Floats, reach: Floats, radius: float) -> Floats:
    depth = np.sqrt(np.clip(1 - reach**2, 0, 1))
    lit = np.clip((x * LIGHT[0] + y * LIGHT[1]) / radius + depth * LIGHT[2], -0.2, 1)
    one, other = (np.array(colour, dtype=float) for colour in SKINS[kind])
    blush = np.clip(0.5 + (x * np.cos(radius) + y * np.sin(radius)) / radius * 0.7, 0, 1)[..., None]
    blush = blush if kind == "Apple" else blush * random.uniform(0, 0.8)
    pores = random.normal(0, {"Orange": 0.06, "Lemon": 0.045, "Pear": 0.05}.get(kind, 0.015), reach.shape)
    body = (one * (1 - blush) + other * blush) * (0.42 + 0.68 * lit + pores)[..., None]
    shine = np.clip(lit, 0, 1) ** 26 * (0.7 if kind in ("Apple", "Plum") else 0.35)
    skin: Floats = body + 255 * shine[..., None]
    return skin


def _outline(kind: str, angle: Floats) -> Floats:
    """The distance of the edge from the middle, in radii, by the angle from the top."""
    up = np.cos(angle)
    if kind == "Pear":
        return 0.92 - 0.18 * up + 0.3 * np.clip(up, 0, 1) ** 6
    if kind == "Lemon":
        return 0.84 + 0.1 * abs(np.sin(angle)) ** 2 + 0.2 * abs(np.sin(angle)) ** 14
    if kind == "Apple":
        return 0.98 - 0.14 * np.clip(up, 0, 1) ** 8 - 0.06 * np.clip(-up, 0, 1) ** 8
    return 0.95 + (0.05 * abs(up) if kind == "Plum" else 0.0 * up)


def _turned(x: Floats, y: Floats, angle: float) -> tuple[Floats, Floats]:
    return x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)


def glyph(alphabet: int, character: int, hand: int, *, size: int = 105) -> bytes:
    """A PNG of a made-up character: three strokes that belong to it, drawn by one of several unsteady hands."""
    strokes = np.random.default_rng([alphabet, character]).uniform(0.15, 0.85, (3, 3, 2))
    shaky = strokes + np.random.default_rng([alphabet, character, hand]).normal(0, 0.025, strokes.shape)
    image = Image.new("L", (size, size), 255)
    draw = ImageDraw.Draw(image)
    for stroke in shaky * size:
        draw.line([(float(x), float(y)) for x, y in stroke], fill=0, width=4, joint="curve")
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def alphabets_zip(alphabets: int = 2, characters: int = 5, hands: int = 6) -> bytes:
    """A zip as of Omniglot: a root, a folder an alphabet, in it one a character."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for a in range(alphabets):
            for c in range(characters):
                for h in range(hands):
                    name = f"drawings/Alphabet {a + 1}/character{c + 1:02}/{h + 1:02}.png"
                    archive.writestr(name, glyph(a, c, h))
    return out.getvalue()
