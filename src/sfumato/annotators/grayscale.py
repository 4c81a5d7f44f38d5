"""Brightness, for ControlNets that colour pictures."""

from __future__ import annotations

from PIL import Image


def grayscale(image: Image.Image) -> Image.Image:
    """The picture without colour: its luma by ITU-R BT.601."""
    return image.convert("L").convert("RGB")
