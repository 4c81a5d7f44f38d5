"""Regions of one colour, for ControlNets that were trained on segmented pictures.

Colours are told apart in Oklab, https://bottosson.github.io/posts/oklab.
"""

from __future__ import annotations

import functools
from typing import Annotated

import numpy as np
from jaxtyping import Bool, Float, Num, UInt8
from PIL import Image, ImageColor, ImageFilter

from sfumato.annotators import Range

PALETTE = {
    "ground": "#000000",
    "black": "#404040",
    "grey": "#a0a4a8",
    "white": "#ffffff",
    "red": "#dc2828",
    "orange": "#ff8c00",
    "yellow": "#ffd728",
    "lime": "#b4d746",
    "green": "#3caa3c",
    "cyan": "#5ac8f0",
    "blue": "#285ad2",
    "purple": "#8c46c8",
    "pink": "#ff82b4",
    "brown": "#82502a",
    "tan": "#d2966e",
    "beige": "#fad296",
}
"""The colours of regions; the first is what is no region."""
COLOURS = np.array([ImageColor.getrgb(colour) for colour in PALETTE.values()], np.uint8)
LIGHTNESS = 0.6
"""How much a difference of lightness counts beside one of hue: shaded green is green still."""


def regions(
    image: Image.Image, *, smooth: Annotated[int, Range(1, 99)] = 5, ground: Annotated[int, Range(-1, 255)] = 12
) -> Image.Image:
    """Flat areas in sixteen colours, what lies around the thing black.

    Each pixel gets the colour of `PALETTE` that looks most like its own, once the picture has been smoothed over
    `smooth` pixels. Ground is what is connected to the picture's border and differs by `ground` at most, of 255, from
    the median colour there; with -1 there is none.
    """
    import cv2

    pixels, width = np.array(image), smooth | 1
    found = nearest(cv2.medianBlur(pixels, width))
    places = np.array(Image.fromarray(found).filter(ImageFilter.ModeFilter(width)))
    return Image.fromarray(COLOURS[np.where(_ground(pixels, ground), 0, places)])


def _ground(pixels: UInt8[np.ndarray, "H W 3"], tolerance: int) -> Bool[np.ndarray, "H W"]:
    """What is around the thing. Of the unsmoothed picture, in which thin outlines still hold it off."""
    import cv2

    off = np.abs(pixels.astype(int) - np.median(_border(pixels), axis=0)).max(-1)
    _, parts = cv2.connectedComponents((off <= tolerance).astype(np.uint8), connectivity=4)
    outside = np.unique(_border(parts))
    return np.isin(parts, outside[outside > 0])


def _border(pixels: Num[np.ndarray, "H W ..."]) -> Num[np.ndarray, "N ..."]:
    """The outermost pixels."""
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def nearest(rgb: UInt8[np.ndarray, "*N 3"]) -> UInt8[np.ndarray, "*N"]:
    """For each colour the number, from 1 on, of that of the palette that looks most like it."""
    red, green, blue = np.moveaxis(rgb >> 3, -1, 0)
    return _table()[red, green, blue]


@functools.cache
def _table() -> UInt8[np.ndarray, "32 32 32"]:
    """The answers of `nearest` to colours in steps of 8."""
    steps = np.arange(32) * 8 + 4
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    difference = _oklab(colours)[:, None] - _oklab(COLOURS[1:])[None]
    return (np.argmin((difference**2).sum(-1), axis=1) + 1).astype(np.uint8).reshape(32, 32, 32)


def _oklab(rgb: Num[np.ndarray, "N 3"]) -> Float[np.ndarray, "N 3"]:
    """Oklab of sRGB in 0 to 255, its lightness scaled."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    to_cones = [
        [0.4122214708, 0.2119034982, 0.0883024619],
        [0.5363325363, 0.6806995451, 0.2817188376],
        [0.0514459929, 0.1073969566, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 1.9779984951, 0.0259040371],
        [0.7936177850, -2.4285922050, 0.7827717662],
        [-0.0040720468, 0.4505937099, -0.8086757660],
    ]
    return np.cbrt(linear @ np.array(to_cones)) @ np.array(to_lab) * [LIGHTNESS, 1, 1]
