import pytest
from PIL import Image

from fewshot_engine.errors import DataError
from fewshot_engine.pixel_cache import build_pixel_cache, read_pixel_cache


def draw(path, colour):
    Image.new("RGB", (20, 10), colour).save(path)
    return path


def test_pixel_cache_names_what_it_cannot_read(tmp_path):
    paths = [draw(tmp_path / f"{i}.png", colour) for i, colour in enumerate(["red", "lime", "blue"])]
    paths.insert(1, tmp_path / "text.png")
    paths[1].write_text("not a picture")
    paths.append(tmp_path / "absent.png")
    out = tmp_path / "cache.npy"
    assert list(build_pixel_cache(paths, 8, out))[-1] == 5
    cache = read_pixel_cache(out, paths, 8)
    assert cache.readable.tolist() == [True, False, True, True, False]
    assert [path for path, _ in cache.refused] == [str(paths[1]), str(paths[4])]
    assert cache.pixels.shape == (5, 8, 8, 3)
    assert cache.pixels[2, 4, 4].tolist() == [0, 255, 0]


def test_pixel_cache_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr("fewshot_engine.pixel_cache.CACHE_BATCH", 2)
    paths = [draw(tmp_path / f"{i}.png", (i, 0, 0)) for i in range(6)]
    out = tmp_path / "cache.npy"
    first = build_pixel_cache(paths, 8, out)
    assert next(first) == 2
    first.close()
    with pytest.raises(DataError, match="2 of 6 photos are decoded"):
        read_pixel_cache(out, paths, 8)
    for path in paths[:2]:
        path.unlink()  # so that decoding them again would show
    assert list(build_pixel_cache(paths, 8, out)) == [4, 6, 6]
    cache = read_pixel_cache(out, paths, 8)
    assert cache.readable.all()
    assert cache.pixels[:, 0, 0, 0].tolist() == list(range(6))
    with pytest.raises(DataError, match="0 of 6"):
        read_pixel_cache(out, paths, 16)
