"""Lines as one scribbles them, for ControlNets that follow a rough drawing."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image

from sfumato.annotators import Range
from sfumato.annotators.canny import STEEPEST, canny


def scribble(
    image: Image.Image, *, blur: Annotated[float, Range(0, 100)] = 1.5,
    low: Annotated[int, Range(0, STEEPEST)] = 40, high: Annotated[int, Range(0, STEEPEST)] = 100,
    width: Annotated[int, Range(1, 99)] = 3,
) -> Image.Image:  # fmt: skip
    """Broad lines along the main edges, white on black.

    The edges that `canny` finds after a Gaussian of `blur` pixels, with its thresholds `low` and `high`, drawn `width`
    pixels broad and rounded off. Raises SfumatoError if `low` is above `high`.
    """
    import cv2

    edges = np.array(canny(image, low=low, high=high, blur=blur))[..., 0]
    pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    soft = cv2.GaussianBlur(cv2.dilate(edges, pen), (0, 0), max(width / 3, 0.5))
    return Image.fromarray(np.where(soft > 127, 255, 0).astype(np.uint8)).convert("RGB")
