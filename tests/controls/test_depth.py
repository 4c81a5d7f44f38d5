"""Depth-to-image against the torch pipeline, and what counts as a depth map."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato import CFG, Depth, SfumatoError

from oracle import assert_close
from runs import Pair, noise, picture


def ramp(height: int = 24, width: int = 24) -> np.ndarray:
    """A depth map of an estimator's range: a slope with a bump."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    return 300 + 20 * y + 400 * np.exp(-((x - width / 3) ** 2 + (y - height / 2) ** 2) / 20)


@pytest.fixture
def pair(saved, loaded) -> Pair:
    return Pair(saved("sd2-depth")[1], loaded("sd2-depth"))


def ours(pair: Pair, depth, **settings) -> np.ndarray:
    return pair.ours(controls=[CFG(5.0), depth], **settings)


@pytest.mark.parity
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_depth_to_image(pair, strength):
    import torch

    depth = ramp()
    want = pair.theirs(image=picture(), depth_map=torch.from_numpy(depth)[None], strength=strength, steps=6)
    got = ours(pair, Depth(depth), image=picture(), strength=strength, steps=6)
    pair.assert_same(got, want)
    assert np.abs(got - ours(pair, Depth(depth.T), image=picture(), strength=strength, steps=6)).max() > 0.02


def test_text_to_image_with_depth_needs_no_picture(pair):
    assert np.isfinite(ours(pair, Depth(ramp()))).all()


def test_only_the_order_of_depths_counts(pair):
    """Not their unit: a map is stretched to [-1, 1]."""
    assert_close(ours(pair, Depth(ramp() * 3 - 7)), ours(pair, Depth(ramp())), 1e-4)


def test_an_estimator_is_asked_once_for_each_picture(pair):
    asked = []

    def estimate(image):
        asked.append(image.size)
        return ramp()

    got = ours(pair, Depth(estimate, image=picture(size=(48, 48))))
    assert asked == [(48, 48)]
    np.testing.assert_array_equal(got, ours(pair, Depth(ramp())))


def test_pictures_are_maps_of_their_brightness(pair):
    gray = np.linspace(0, 255, 24 * 24).reshape(24, 24).astype(np.uint8)
    want = ours(pair, Depth(gray.astype(np.float32)))
    assert_close(ours(pair, Depth(Image.fromarray(gray))), want, 1e-4)
    assert_close(ours(pair, Depth(np.repeat(gray[..., None], 3, axis=2))), want, 1e-4)


def test_maps_of_other_proportions_are_cropped_evenly(pair):
    wide = np.pad(ramp(), ((0, 0), (8, 8)), constant_values=-1e4)
    np.testing.assert_array_equal(ours(pair, Depth(wide)), ours(pair, Depth(ramp())))


def test_one_map_for_each_picture(pair):
    start, prompts = noise((2, 8, 8, 4)), ["a fox", "a bird"]
    both = ours(pair, Depth([ramp(), ramp().T]), prompt=prompts, latents=start)
    second = ours(pair, Depth(ramp().T), prompt=prompts[1], latents=start[1:])
    assert_close(both[1:], second, 1e-5)


def test_a_flat_map_is_finite(pair):
    assert np.isfinite(ours(pair, Depth(np.ones((8, 8))))).all()


@pytest.mark.parametrize(("kind", "controls", "words"), [
    ("sd1", [Depth(ramp())], "Depth needs a model of 5 input channels.*this one has 4"),
    ("sd2-depth", [], r"1 input channels? beside the latents, which no control fills; add Depth\(depth\)"),
    ("sd2-depth", [Depth(None)], "given no depth"),
    ("sd2-depth", [Depth([])], "given no depth"),
    ("sd2-depth", [Depth(lambda image: ramp())], "no picture to ask it about"),
    ("sd2-depth", [Depth(np.full((4, 4), np.nan))], "not finite"),
    ("sd2-depth", [Depth(np.ones(4))], r"array \[H, W\], not of shape \(4,\)"),
    ("sd2-depth", [Depth("nowhere.png")], "nowhere.png is not there"),
    ("sd2-depth", [Depth([ramp()] * 3)], "3 maps were given for 1 pictures"),
    ("sd2-depth", [Depth(ramp()), Depth(ramp())], "Depth and Depth both set the extra input channels"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(kind, controls, words, loaded):
    with pytest.raises(SfumatoError, match=words) as error:
        sfumato.generate(loaded(kind), "a fox", controls=controls, steps=2, size=(16, 16))
    assert str(error.value).count(". ") == 0
