"""A scribble follows the main edges, and is broad."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.annotators.scribble import scribble
from sfumato.errors import SfumatoError


def box() -> Image.Image:
    picture = Image.new("RGB", (60, 60), "white")
    picture.paste("blue", (20, 20, 40, 40))
    return picture


@pytest.mark.parametrize("width", [3, 7])
def test_the_lines_are_as_broad_as_asked_for_and_where_the_edges_are(width):
    lines = np.asarray(scribble(box(), width=width))[..., 0] > 0
    across = lines[30]
    assert width - 1 <= across[:30].sum() <= width + 2
    assert 18 <= np.flatnonzero(across[:30]).mean() <= 21
    assert not lines[:10].any()
    assert not lines[28:32, 28:32].any()


def test_fine_texture_is_left_out():
    noisy = np.asarray(box()) + np.random.default_rng(0).integers(-25, 25, (60, 60, 1))
    lines = np.asarray(scribble(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))))[..., 0] > 0
    clean = np.asarray(scribble(box()))[..., 0] > 0
    assert (lines & clean).sum() > 0.8 * clean.sum()
    assert (lines & ~clean).sum() < 0.5 * clean.sum()


def test_thresholds_must_be_in_order():
    with pytest.raises(SfumatoError, match="low=200 is above high=100"):
        scribble(box(), low=200)
