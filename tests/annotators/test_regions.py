"""Regions are flat, of the palette, and told from the ground."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from sfumato.annotators.regions import COLOURS, PALETTE, regions


def thing(ground: str = "white") -> Image.Image:
    """A shaded red disc with a white spot inside, outlined."""
    picture = Image.new("RGB", (80, 80), ground)
    pen = ImageDraw.Draw(picture)
    pen.ellipse([10, 10, 70, 70], fill=(225, 45, 40))
    pen.ellipse([10, 40, 70, 70], fill=(205, 35, 35))
    pen.ellipse([30, 25, 50, 40], fill="white")
    return picture


def colours(picture: Image.Image, **options) -> np.ndarray:
    return np.asarray(regions(picture, **options))


def test_all_colours_are_of_the_palette_and_shades_are_one():
    made = colours(thing())
    found = {tuple(int(value) for value in colour) for colour in np.unique(made.reshape(-1, 3), axis=0)}
    assert found == {tuple(COLOURS[list(PALETTE).index(name)].tolist()) for name in ("ground", "white", "red")}


def test_the_ground_is_black_and_the_same_colour_inside_is_not():
    made = colours(thing())
    assert not made[:9].any()
    assert made[32, 40].tolist() == [255, 255, 255]
    assert colours(thing(), ground=-1)[0, 0].tolist() == [255, 255, 255]


def test_any_ground_will_do():
    np.testing.assert_array_equal(colours(thing("blue"))[0, 0], 0)
    # The disc is told from the ground along its outline.
    assert (colours(thing("blue")).any(-1) == colours(thing()).any(-1)).mean() > 0.98


def test_a_thin_outline_holds_the_ground_off():
    picture = Image.new("RGB", (60, 60), "white")
    ImageDraw.Draw(picture).ellipse([10, 10, 50, 50], outline="black", width=1)
    assert colours(picture)[30, 30].tolist() == [255, 255, 255]
