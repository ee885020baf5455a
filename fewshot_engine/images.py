"""Untrusted bytes to an oriented RGB picture, and the small JPEGs that a page shows instead of the original.

Nothing here imports torch. Everything is safe to call from several threads: the only global state, Pillow's own limits,
is set once when this module is imported.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pillow_heif
from PIL import Image, ImageCms, UnidentifiedImageError

from fewshot_engine.errors import ImageRefused

MAX_MEGAPIXELS = 50
ALLOWED_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "HEIF", "AVIF")

THUMBNAIL_SIDE, THUMBNAIL_QUALITY = 256, 80  # shorter side
WORKING_SIDE, WORKING_QUALITY = 1600, 90  # longer side

# Pillow's second line of defence, behind the check of our own below. The filters are set here once, because
# warnings.catch_warnings() around each call would race between threads.
Image.MAX_IMAGE_PIXELS = MAX_MEGAPIXELS * 1_000_000
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
pillow_heif.register_heif_opener(thumbnails=False)
Image.init()


@dataclass(frozen=True)
class Decoded:
    """A photo that can be trusted.

    Attributes:
        rgb: mode RGB, upright; smaller than the original where `decode` was allowed a reduced scale.
        format: one of ALLOWED_FORMATS.
        width, height: of the original, upright, in pixels.
        notes: what was done to it that a person may want to know.
        captured_at: the camera's own clock (EXIF DateTimeOriginal, no time zone), where it says so.
    """

    rgb: Image.Image
    format: str
    width: int
    height: int
    notes: tuple[str, ...] = ()
    captured_at: datetime | None = None


@dataclass(frozen=True)
class Derivatives:
    """JPEG files without any metadata."""

    thumbnail: bytes
    working: bytes


def decode(source: bytes | str | Path | BinaryIO, *, min_side: int | None = None) -> Decoded:
    """Decode one photo, whatever its bytes.

    Args:
        source: the file's bytes, its path, or an open binary file that can seek.
        min_side: what the shorter side is needed at, in pixels; a large JPEG is then decoded at 1/2, 1/4 or 1/8 of its
            size, never below this. None decodes every pixel.

    Raises:
        ImageRefused: it is no photo, or a damaged or an oversized one; `code` is one of empty, not-an-image,
            unsupported, too-large, truncated, corrupt.
        OSError: the path cannot be opened.
        MemoryError: the machine has no room for a picture of a size that is allowed.
    """
    with _opened(source) as file:
        head = file.read(512)
        file.seek(0)
        if not head:
            raise ImageRefused("empty", "The file is empty.")
        try:
            return _decode(file, min_side)
        except (ImageRefused, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise ImageRefused("too-large", f"The picture is larger than {MAX_MEGAPIXELS} megapixels.") from error
        except UnidentifiedImageError as error:
            raise _unidentified(head) from error
        except Exception as error:  # hostile bytes make Pillow raise nearly anything: struct.error, SyntaxError…
            raise _damaged(error) from error


def derivatives(image: Image.Image) -> Derivatives:
    """The thumbnail (shorter side 256 px) and the working copy (longer side at most 1600 px), never enlarged.

    Colours of an embedded profile other than sRGB (Display P3 of phones) are converted, because the copies carry none.

    Args:
        image: mode RGB, such as `Decoded.rgb`.
    """
    width, height = image.size
    working = _to_srgb(_shrunk(image, min(1.0, WORKING_SIDE / max(width, height))), image.info.get("icc_profile"))
    # A long panorama's working copy can be lower than a thumbnail should be: the thumbnail then has its height.
    thumbnail = _shrunk(working, min(1.0, THUMBNAIL_SIDE / min(working.size)))
    return Derivatives(_jpeg(thumbnail, THUMBNAIL_QUALITY), _jpeg(working, WORKING_QUALITY))


@contextmanager
def _opened(source: bytes | str | Path | BinaryIO) -> Iterator[BinaryIO]:
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(source)
    elif isinstance(source, str | Path):
        with open(source, "rb") as file:
            yield file
    else:
        source.seek(0)
        yield source


def _decode(file: BinaryIO, min_side: int | None) -> Decoded:
    with Image.open(file, formats=ALLOWED_FORMATS) as image:
        _check_size(image.size)
        full_size = image.size
        if min_side is not None and image.format in ("JPEG", "MPO"):
            image.draft(None, (min_side, min_side))
        image.load()
        _check_size(image.size)  # some formats know their true size only now
        exif = _exif(image)
        orientation = exif.get(0x0112, 1) if image.format != "TIFF" else 1  # Pillow turns TIFF files by itself
        if image.format == "TIFF":
            full_size = image.size
        rgb, notes = _to_rgb(image)
        if _has_more_frames(image):
            notes.append("animated or several pictures: the first one is used")
        icc_profile = image.info.get("icc_profile")
        file_format = "JPEG" if image.format == "MPO" else str(image.format)
    turn = _TURNS.get(orientation)
    if turn is not None:
        rgb = rgb.transpose(turn)
    if turn in _SWAPS_SIDES:
        full_size = (full_size[1], full_size[0])
    rgb.info = {"icc_profile": icc_profile} if icc_profile and isinstance(icc_profile, bytes) else {}
    return Decoded(rgb, file_format, *full_size, tuple(notes), _captured_at(exif))


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}


def _check_size(size: tuple[int, int]) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageRefused("corrupt", f"The file says that its picture is {width} × {height} pixels.")
    if width * height > MAX_MEGAPIXELS * 1_000_000:
        megapixels = width * height / 1e6
        raise ImageRefused(
            "too-large", f"The picture has {megapixels:,.0f} megapixels; at most {MAX_MEGAPIXELS} are accepted."
        )


def _to_rgb(image: Image.Image) -> tuple[Image.Image, list[str]]:
    """A loaded image of any mode as RGB that shares nothing with it, and what was done."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy(), []
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled_to_8_bits(image).convert("RGB"), ["more than 8 bits a channel, scaled to 8"]
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat = Image.new("RGB", rgba.size, "white")
        flat.paste(rgba, mask=rgba)
        return flat, ["transparent, laid on white"]
    if image.mode == "CMYK":
        return image.convert("RGB"), ["CMYK, converted to RGB"]
    return image.convert("RGB"), []


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Whole numbers of 16 bits over 257; floats and wider numbers from their own smallest to their largest value."""
    values = np.asarray(image).astype(np.float32)
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0
    elif image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    scaled = (values - low) * (255.0 / max(high - low, 1e-12))
    return Image.fromarray(np.clip(scaled + 0.5, 0, 255).astype(np.uint8))


def _exif(image: Image.Image) -> dict[int, Any]:
    """Orientation and capture time. A photo with damaged EXIF is still a photo, so nothing is raised."""
    try:
        exif = image.getexif()
        found = {0x0112: exif.get(0x0112, 1)}
        if 0x8769 in exif:
            found[0x9003] = exif.get_ifd(0x8769).get(0x9003)
    except Exception:
        return {}
    return found


def _captured_at(exif: dict[int, Any]) -> datetime | None:
    try:
        return datetime.strptime(str(exif.get(0x9003))[:19], "%Y:%m:%d %H:%M:%S")  # the camera knows no time zone
    except ValueError:
        return None


def _has_more_frames(image: Image.Image) -> bool:
    if image.format in ("JPEG", "MPO"):  # a phone's MPO carries a depth or a brightness map, no second photo
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the frames after the first are damaged, and nobody needs them
        return True


def _damaged(error: Exception) -> ImageRefused:
    said = str(error).lower()
    if isinstance(error, EOFError) or "truncated" in said or "end of file" in said or "not enough" in said:
        return ImageRefused("truncated", "The file is incomplete: its end is missing.")
    return ImageRefused("corrupt", "The file is damaged and cannot be read as a picture.")


_SIGNATURES = (
    (b"\xff\xd8\xff", "corrupt", "The file starts like a JPEG, but is damaged."),
    (b"\x89PNG", "corrupt", "The file starts like a PNG, but is damaged."),
    (b"%PDF", "not-an-image", "This is a PDF document, not a photo."),
    (b"PK\x03\x04", "not-an-image", "This is a zip archive or an office document, not a photo."),
    (b"8BPS", "unsupported", "Photoshop files are not supported: export a JPEG or PNG."),
)


def _unidentified(head: bytes) -> ImageRefused:
    """Why Pillow knew no format: a name for what the file is instead."""
    for signature, code, sentence in _SIGNATURES:
        if head.startswith(signature):
            return ImageRefused(code, sentence)
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if b"<svg" in start:
        return ImageRefused("unsupported", "This is an SVG drawing, not a photo: export it as PNG first.")
    if start.startswith((b"<!doctype html", b"<html")) or b"<body" in start or b"<script" in start:
        return ImageRefused("not-an-image", "This is a web page, not a photo.")
    if head[4:8] == b"ftyp":
        return ImageRefused("unsupported", "This is a video, or a picture format that is not supported.")
    if _looks_like_text(head):
        return ImageRefused("not-an-image", "This is a text file, not a photo.")
    return ImageRefused(
        "not-an-image", "This is no picture that can be read: use JPEG, PNG, WebP, HEIC, TIFF, GIF or BMP."
    )


def _looks_like_text(head: bytes) -> bool:
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        text = head[: error.start].decode() if error.start > len(head) - 4 else ""
    return bool(text) and all(character.isprintable() or character.isspace() for character in text)


def _shrunk(image: Image.Image, scale: float) -> Image.Image:
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile or b"sRGB" in profile or "sRGB".encode("utf-16-be") in profile:
        return image
    try:
        converted = ImageCms.profileToProfile(
            image, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):  # a damaged profile costs the exact colours, not the photo
        return image
    return converted if converted is not None else image


def _jpeg(image: Image.Image, quality: int) -> bytes:
    # A copy of the pixels alone: whatever `info` holds (EXIF, ICC, comments) must not reach the file.
    image = image.copy()
    image.info = {}
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
