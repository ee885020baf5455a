import numpy as np
import pytest
from PIL import Image

from fewshot_engine import cli
from fewshot_engine.encoder import Encoder
from fewshot_engine.framing import Square


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Where pretrained encoders keep what they export, once for all tests."""
    return tmp_path_factory.mktemp("exported")


@pytest.fixture
def colours(tmp_path):
    """Three classes of a colour each, four pictures a class."""
    shades = np.random.default_rng(0).integers(150, 256, 8)
    for name, channel in (("red", 0), ("green", 1), ("blue", 2)):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for number in range(4):
            colour = [number * 9, number * 5, 12]
            colour[channel] = int(shades[number])
            Image.new("RGB", (12, 10), tuple(colour)).save(tmp_path / "colours" / name / f"{number}.png")
    return tmp_path / "colours"


@pytest.fixture
def use_encoder(monkeypatch):
    """Give the commands an encoder and a recipe, instead of what they ask for; returns what they asked for."""

    def use(encoder, recipe=None):
        asked = []

        def load(name, **options):
            asked.append((name, options["views"]))
            return encoder, recipe

        monkeypatch.setattr(cli, "load_with_recipe", load)
        return asked

    return use


@pytest.fixture
def mean_colour():
    """An encoder that sees the mean colour alone: the pictures here have nothing else."""
    return Encoder("mean", dim=3, squares=[Square(8)], forward=lambda p: p.mean(axis=(1, 2), dtype=np.float32) - 128)


@pytest.fixture
def mean_colour_encoder(use_encoder, mean_colour):
    return use_encoder(mean_colour)
