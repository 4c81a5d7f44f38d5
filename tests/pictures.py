"""Pictures for tests, drawn and not stored."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw


def drawing(width: int = 48, height: int = 32) -> Image.Image:
    """A red disc and a blue box on a sloping ground: nothing in it is symmetric."""
    x, y = np.meshgrid(np.linspace(0, 120, width), np.linspace(100, 240, height))
    picture = Image.fromarray(np.stack([x, y, (x + y) / 2], axis=-1).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    pen.ellipse([width * 0.1, height * 0.1, width * 0.4, height * 0.55], fill=(230, 20, 30))
    pen.rectangle([width * 0.5, height * 0.6, width * 0.9, height * 0.9], fill=(10, 30, 240))
    return picture
