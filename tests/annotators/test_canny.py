"""Canny's edges lie where edges are."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from sfumato.annotators.canny import canny

from pictures import drawing


def edges(picture, **options) -> np.ndarray:
    return np.asarray(canny(picture, **options))


def test_it_is_opencv_with_the_usual_thresholds():
    expected = cv2.Canny(np.asarray(drawing()), 100, 200)
    assert expected.any()
    np.testing.assert_array_equal(edges(drawing()), np.stack([expected] * 3, axis=-1))
    assert {*np.unique(edges(drawing()))} == {0, 255}


def test_a_box_has_an_edge_around_it_and_nothing_else():
    picture = Image.new("RGB", (40, 40), "black")
    picture.paste("white", (10, 10, 30, 30))
    found = edges(picture)[..., 0] > 0
    near = np.zeros((40, 40), bool)
    near[8:32, 8:32] = True
    near[12:28, 12:28] = False
    assert not found[~near].any()
    assert found.sum() >= 4 * 18


def test_thresholds_and_blur_leave_out_what_is_weak():
    rng = np.random.default_rng(0)
    noisy = np.asarray(drawing(), np.float64) + rng.normal(0, 25, (32, 48, 3))
    noisy = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    counts = [(edges(noisy, **options) > 0).sum() for options in ({}, {"blur": 1.5}, {"low": 600, "high": 900})]
    assert counts[0] > 2 * counts[1]
    assert counts[0] > 2 * counts[2]
    assert not edges(noisy, low=2040, high=2040).any()
