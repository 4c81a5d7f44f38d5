"""What inpainting does to pictures once they are decoded."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato import Inpaint
from sfumato.controls.inpaint import continued


def halves(inside: int = 255) -> np.ndarray:
    mask = np.zeros((32, 32), np.uint8)
    mask[:, 16:] = inside
    return mask


def test_the_known_part_comes_back_exactly_and_the_rest_is_what_was_painted():
    rng = np.random.default_rng(0)
    known, painted = (rng.integers(0, 256, (2, 32, 64, 3), np.uint8) for _ in range(2))
    mask = np.concatenate([halves(), halves(255) | 255], 1)  # wide, so that the right end is far from its edge
    found = Inpaint(list(known), mask).finish(painted)
    np.testing.assert_array_equal(found[:, :, :16], known[:, :, :16])
    np.testing.assert_array_equal(found[:, :, 56:], painted[:, :, 56:])


@pytest.mark.parametrize("off", [-30, 12])
def test_colours_that_are_off_by_the_same_everywhere_leave_no_seam(off):
    """And the correction fades: far from the edge the picture is as it was."""
    known = np.full((32, 64, 3), 100, np.uint8)
    mask = np.zeros((32, 64, 1), np.float32)
    mask[:, 16:] = 1
    found = continued(known + np.uint8(off % 256), known, mask).astype(int)[:, 16:, 0] - 100
    assert np.abs(found[:, 0]).max() <= 1
    assert (np.diff(np.abs(found[5])) >= 0).all()
    assert np.abs(found[:, -8:] - off).max() <= 1


def test_what_fits_already_stays():
    known = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    mask = (halves() > 0).astype(np.float32)[..., None]
    painted = np.where(mask > 0, 255 - known, known)
    np.testing.assert_array_equal(continued(painted, known, mask), painted)
    everything = np.ones_like(mask)
    np.testing.assert_array_equal(continued(painted, known, everything), painted)
