import numpy as np
import pytest
from PIL import Image, ImageOps

from fewshot_engine.errors import ConfigError
from fewshot_engine.framing import Square, View, preprocess, read_views


def test_a_padded_square_holds_the_whole_photo_between_bars_of_its_mean():
    image = Image.new("RGB", (40, 20), (200, 0, 0))
    image.paste((0, 0, 100), (20, 0, 40, 20))
    square = Square(20, padded=True).cut(image)
    assert (square[5:15, :9] == (200, 0, 0)).all()
    assert (square[5:15, 11:] == (0, 0, 100)).all()
    assert (np.abs(square[:5].astype(int) - (100, 0, 50)) <= 1).all()
    assert (square[15:] == square[0, 0]).all()
    np.testing.assert_array_equal(
        Square(20, padded=True).cut(image.resize((20, 20))), Square(20).cut(image.resize((20, 20)))
    )


def test_a_corner_or_a_crop_is_what_its_name_says():
    image = Image.new("RGB", (40, 20), "black")
    image.paste("red", (32, 12, 40, 20))  # the lower right corner, 40 % of the shorter side
    assert (Square(8, share=0.4, across=1, down=1).cut(image) == [255, 0, 0]).all()
    assert not Square(8, share=0.4).cut(image).any()
    assert Square(8, share=0.4).needs_side == 20
    np.testing.assert_array_equal(Square(8, mirrored=True).cut(image), Square(8).cut(ImageOps.mirror(image)))


def test_preprocessing_cuts_out_the_centre():
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    square = preprocess(image, 16)
    assert (square.shape, square.dtype) == ((16, 16, 3), np.uint8)
    np.testing.assert_array_equal(square[8, 2:14], [[0, 0, 255]] * 12)
    assert preprocess(image.rotate(90, expand=True), 16).shape == (16, 16, 3)
    assert preprocess(Image.new("RGB", (1, 500)), 16).shape == (16, 16, 3)


def test_views_are_read_in_their_order():
    assert read_views(["mirror", "crop:0.5"]) == (View(mirrored=True), View(0.5))
    corners = read_views(["corners"])
    assert {(view.across, view.down) for view in corners} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert {view.share for view in corners} == {0.8}


@pytest.mark.parametrize(
    "views", [(), ("whole", "whole"), ("upside-down",), ("crop:2",), ("crop:1",), ("crop:x",), ("whole:0.5",)]
)
def test_views_that_make_no_sense_are_named(views):
    with pytest.raises(ConfigError, match="view"):
        read_views(views)
