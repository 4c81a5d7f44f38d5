"""The luma of ITU-R BT.601."""

from __future__ import annotations

import numpy as np

from sfumato.annotators.grayscale import grayscale

from pictures import drawing


def test_all_channels_are_the_luma():
    made, picture = np.asarray(grayscale(drawing()), np.float64), np.asarray(drawing(), np.float64)
    luma = picture @ [0.299, 0.587, 0.114]
    assert np.abs(made - luma[..., None]).max() <= 1
