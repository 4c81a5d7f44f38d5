"""A drawing on paper as control picture."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image

from sfumato.annotators import Range


def sketch(
    image: Image.Image, *, contrast: Annotated[int, Range(1, 255)] = 24, width: Annotated[int, Range(1, 99)] = 3
) -> Image.Image:
    """The lines of a drawing that is dark on light, white on black.

    A pixel belongs to a line if it is darker by `contrast`, of 255, than the paper around it, which is taken from an
    area of a tenth of the picture, so that a photograph with a shadow on it will do. Lines are at least `width` pixels
    broad.
    """
    import cv2

    grey = np.array(image.convert("L"))
    around = max(image.size) // 10 | 1
    paper = cv2.morphologyEx(grey, cv2.MORPH_CLOSE, np.ones((around, around), np.uint8))
    dark = (paper.astype(int) - grey >= contrast).astype(np.uint8) * 255
    pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (width, width))
    return Image.fromarray(cv2.dilate(dark, pen)).convert("RGB")
