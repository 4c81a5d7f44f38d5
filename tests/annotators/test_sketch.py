"""A drawing on paper, also under uneven light, becomes white lines."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sfumato.annotators.sketch import sketch


def paper(shadow: float, width: int = 4) -> tuple[Image.Image, np.ndarray]:
    """A circle drawn on paper whose light falls off by `shadow` towards one side, and where its line is."""
    picture = Image.new("L", (100, 100), 235)
    ImageDraw.Draw(picture).ellipse([20, 20, 80, 80], outline=70, width=width)
    drawn = np.asarray(picture)
    lit = drawn * np.linspace(1, 1 - shadow, 100)
    return Image.fromarray(lit.astype(np.uint8)).convert("RGB"), drawn < 100


@pytest.mark.parametrize("shadow", [0.0, 0.6])
def test_lines_are_found_in_any_light(shadow):
    picture, drawn = paper(shadow)
    found = np.asarray(sketch(picture, width=1))[..., 0] > 127
    assert (found == drawn).mean() > 0.99


def test_thin_lines_become_broad_enough():
    picture, _ = paper(0, width=1)
    found = np.asarray(sketch(picture, width=5))[..., 0] > 127
    assert found[50, :50].sum() in (5, 6)


def test_what_is_faint_is_no_line():
    picture, _ = paper(0)
    assert not np.asarray(sketch(picture, contrast=200)).any()
