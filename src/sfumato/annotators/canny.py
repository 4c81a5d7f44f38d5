"""Edges by the method of Canny, https://doi.org/10.1109/TPAMI.1986.4767851."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image

from sfumato.annotators import Range
from sfumato.errors import SfumatoError

STEEPEST = 2040
"""Sum of the largest horizontal and vertical Sobel gradients of 8-bit values, 4 * 255 each."""


def canny(
    image: Image.Image, *, low: Annotated[int, Range(0, STEEPEST)] = 100,
    high: Annotated[int, Range(0, STEEPEST)] = 200, blur: Annotated[float, Range(0, 100)] = 0.0,
) -> Image.Image:  # fmt: skip
    """Thin edges, white on black.

    An edge starts where the gradient (the sum of its horizontal and vertical Sobel parts, of the channel where it is
    largest) is above `high`, and goes on while it is above `low`. `blur` is the standard deviation in pixels of a
    Gaussian that comes first; with 0 there is none. Raises SfumatoError if `low` is above `high`.
    """
    import cv2

    if low > high:
        raise SfumatoError(f"The annotator canny: low={low} is above high={high}.")
    pixels = np.array(image)
    if blur:
        pixels = cv2.GaussianBlur(pixels, (0, 0), blur)
    return Image.fromarray(cv2.Canny(pixels, low, high)).convert("RGB")
