"""Untrusted files: each kind is drawn here, none is trusted."""

import io
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from fewshot_engine.errors import ImageRefused
from fewshot_engine.images import MAX_MEGAPIXELS, decode, derivatives


def picture(width=64, height=48, mode="RGB"):
    """Red on the left half, blue on the right, with a white corner at the top left."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, : width // 2, 0] = 255
    pixels[:, width // 2 :, 2] = 255
    pixels[: height // 4, : width // 4] = 255
    return Image.fromarray(pixels).convert(mode)


def saved(image, file_format="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def near(pixel, expected, tolerance=40):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, expected, strict=True))


def refusal(data):
    with pytest.raises(ImageRefused) as caught:
        decode(data)
    assert str(caught.value).endswith(".")
    return caught.value.code


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_each_format_is_read(file_format):
    photo = decode(saved(picture(), file_format))
    assert (photo.format, photo.width, photo.height, photo.rgb.mode) == (file_format, 64, 48, "RGB")
    assert near(photo.rgb.getpixel((5, 40)), (255, 0, 0))
    assert near(photo.rgb.getpixel((60, 40)), (0, 0, 255))


def test_heic_is_read():
    buffer = io.BytesIO()
    pillow_heif.from_pillow(picture(128, 96)).save(buffer, quality=90)
    photo = decode(buffer.getvalue())
    assert (photo.format, photo.width, photo.height) == ("HEIF", 128, 96)
    assert near(photo.rgb.getpixel((10, 80)), (255, 0, 0))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_ends_upright(orientation):
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture() if orientation == 1 else picture().transpose(inverse[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file_format in ("JPEG", "PNG", "TIFF"):
        photo = decode(saved(stored, file_format, exif=exif))
        assert (photo.width, photo.height) == photo.rgb.size == (64, 48)
        assert near(photo.rgb.getpixel((3, 3)), (255, 255, 255))
        assert near(photo.rgb.getpixel((5, 40)), (255, 0, 0))


def test_capture_time_comes_from_exif():
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9003] = "2021:07:04 13:05:59"
    assert decode(saved(picture(), exif=exif)).captured_at == datetime(2021, 7, 4, 13, 5, 59)
    assert decode(saved(picture())).captured_at is None


@pytest.mark.filterwarnings("ignore::UserWarning")  # as the module itself asks, outside of pytest
def test_damaged_exif_does_not_cost_the_photo():
    photo = decode(saved(picture(), exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage"))
    assert (photo.width, photo.captured_at) == (64, None)


def test_cmyk_is_converted_and_said():
    photo = decode(saved(picture(mode="CMYK")))
    assert near(photo.rgb.getpixel((5, 40)), (255, 0, 0))
    assert "CMYK" in photo.notes[0]


def test_sixteen_bits_are_scaled_not_clipped():
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))
    for file_format in ("PNG", "TIFF"):
        photo = decode(saved(Image.fromarray(ramp), file_format))
        assert np.abs(np.asarray(photo.rgb)[0, :, 0].astype(int) - np.arange(256)).max() <= 1
        assert "8 bits" in photo.notes[0]


def test_alpha_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert decode(saved(image, "PNG")).rgb.getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30] * 256)
    assert decode(saved(palette, "PNG", transparency=0)).rgb.getpixel((4, 4)) == (255, 255, 255)
    assert decode(saved(palette, "PNG")).rgb.getpixel((4, 4)) == (10, 20, 30)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_used_and_said(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "lime", "blue")]
    photo = decode(saved(frames[0], file_format, save_all=True, append_images=frames[1:]))
    assert near(photo.rgb.getpixel((8, 8)), (255, 0, 0))
    assert "first one" in photo.notes[-1]


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>no photo</body></html>", "not-an-image"),
        (b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported"),
        ("just a text, schön".encode(), "not-an-image"),
        (b"%PDF-1.7 ...", "not-an-image"),
        (b"PK\x03\x04" + bytes(60), "not-an-image"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(60), "unsupported"),
        (b"\xff\xd8\xff\xe0" + bytes(60), "corrupt"),
        (bytes(range(256)), "not-an-image"),
    ],
)
def test_what_is_no_photo_is_refused_with_its_reason(data, code):
    assert refusal(data) == code


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_truncated_photo_is_refused(file_format):
    data = saved(Image.effect_noise((200, 200), 80).convert("RGB"), file_format)
    assert refusal(data[: len(data) // 2]) in ("truncated", "corrupt", "not-an-image")


def test_a_polyglot_is_only_its_pixels():
    photo = decode(saved(picture()) + b"<script>alert(1)</script>")
    made = derivatives(photo.rgb)
    assert b"script" not in made.thumbnail + made.working


def bomb(width, height):
    """A PNG of zeros: a few kilobytes that decode to width × height pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8000, 13000, 60000])
def test_a_bomb_is_refused_before_it_is_unpacked(side):
    data = (
        bomb(side, side)
        if side < 20000
        else bomb(13000, 13000).replace(struct.pack(">II", 13000, 13000), struct.pack(">II", side, side))
    )
    tracemalloc.start()
    started = time.perf_counter()
    code = refusal(data)
    took, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert code in ("too-large", "corrupt")
    assert peak < 20e6
    print(f"{side}² refused in {took * 1e3:.1f} ms, {peak / 1e6:.1f} MB")


def test_just_below_the_cap_is_read():
    side = int((MAX_MEGAPIXELS * 1e6) ** 0.5)
    assert decode(bomb(side, side)).width == side


def test_an_animated_bomb_is_refused():
    data = bytearray(saved(Image.new("P", (4, 4)), "GIF"))
    data[6:10] = struct.pack("<HH", 65000, 65000)
    assert refusal(bytes(data)) == "too-large"


def test_a_large_jpeg_is_decoded_at_a_reduced_scale_but_never_too_small():
    data = saved(picture(1600, 1200))
    photo = decode(data, min_side=224)
    assert (photo.width, photo.height) == (1600, 1200)
    assert photo.rgb.size == (400, 300)
    assert decode(data, min_side=700).rgb.size == (1600, 1200)
    assert decode(data).rgb.size == (1600, 1200)


def test_paths_and_open_files_are_read_as_bytes_are(tmp_path):
    data = saved(picture(), "PNG")
    path = tmp_path / "a.jpg"  # whatever its name says
    path.write_bytes(data)
    with path.open("rb") as file:
        assert decode(path).rgb.tobytes() == decode(str(path)).rgb.tobytes() == decode(file).rgb.tobytes()
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "missing.jpg")


SEEDS = [
    saved(picture(40, 30), "JPEG"),
    saved(picture(40, 30), "PNG"),
    saved(picture(40, 30), "GIF"),
    saved(picture(40, 30), "WEBP"),
    saved(picture(40, 30), "TIFF", compression="tiff_lzw"),
    saved(picture(40, 30), "BMP"),
]


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(SEEDS), st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=12), st.floats(0, 1)
)
def test_mutated_bytes_are_read_or_refused_and_nothing_else(seed, changes, cut):
    data = bytearray(seed)
    for place, value in changes:
        data[int(place * len(data))] = value
    if cut > 0.5:
        del data[int(len(data) * cut) :]
    try:
        outcome = decode(bytes(data)).rgb.mode
    except ImageRefused as error:
        outcome = error.code
    assert outcome in {"RGB", "empty", "not-an-image", "unsupported", "too-large", "truncated", "corrupt"}


def test_many_threads_decode_good_and_bad_files_alike():
    good, bad = SEEDS[0], SEEDS[1][:60]
    expected = decode(good).rgb.tobytes()

    def work(number):
        if number % 2:
            return refusal(bad) in ("truncated", "corrupt")
        return decode(good).rgb.tobytes() == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(400)))


def test_derivatives_are_small_enough_and_carry_no_metadata():
    exif = Image.Exif()
    exif[0x010F] = "CanaryCamera"
    photo = decode(saved(picture(2000, 1000), exif=exif, comment=b"CanaryComment"))
    made = derivatives(photo.rgb)
    thumbnail, working = Image.open(io.BytesIO(made.thumbnail)), Image.open(io.BytesIO(made.working))
    assert (thumbnail.size, working.size) == ((512, 256), (1600, 800))
    assert b"Canary" not in made.thumbnail + made.working
    assert "exif" not in working.info
    assert "icc_profile" not in working.info


def test_derivatives_never_enlarge():
    made = derivatives(picture(100, 40))
    assert Image.open(io.BytesIO(made.thumbnail)).size == Image.open(io.BytesIO(made.working)).size == (100, 40)


def test_a_damaged_colour_profile_costs_no_photo():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile at all" * 20):
        photo = decode(saved(picture(), icc_profile=profile))
        assert near(Image.open(io.BytesIO(derivatives(photo.rgb).working)).getpixel((5, 40)), (255, 0, 0))
