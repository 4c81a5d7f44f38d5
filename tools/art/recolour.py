"""What colour a picture's thing has, and the same picture with the thing in another one."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from PIL import ImageColor

from sfumato.annotators.regions import PALETTE

Picture = UInt8[np.ndarray, "H W 3"]
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
"""Those of `PALETTE` that a hue tells apart."""
NEAR, FAR = 35.0, 60.0
"""Degrees of hue around that of the thing within which a pixel is wholly, or in part, of its colour."""
PALE = 15.0
"""Chroma (CIELAB) under which a pixel has no colour."""
SHARE = 0.35
"""How much of what is not white a colour covers that is the thing's."""
CALLED = {name: name for name in COLOURS} | {"cyan": "blue", "lime": "green"} | dict.fromkeys(("brown", "tan", "beige"))
"""What each colour of `PALETTE` is called; None is what has no hue of its own."""


def colour_of(picture: Picture) -> str | None:
    """What the thing's colour is called, if it has one and that is one of `COLOURS`."""
    lightness, chroma, hue = _polar(picture)
    centre = _main_hue(lightness, chroma, hue)
    if centre is None:
        return None
    own = (chroma > PALE) & (np.abs(_turn(hue - centre)) < NEAR)
    middle = _cartesian(*(np.median(each[own]) for each in (lightness, chroma)), centre)
    far = {name: float(np.linalg.norm(middle - _cartesian(*_named(name)))) for name in CALLED}
    return CALLED[min(far, key=far.__getitem__)]


def recoloured(picture: Picture, colour: str) -> Picture | None:
    """The picture with what has the thing's colour in another one of `COLOURS`, None if the thing has no colour.

    Hues are turned, lightness and chroma moved towards the colour's own, so that shading stays.
    """
    lightness, chroma, hue = _polar(picture)
    centre = _main_hue(lightness, chroma, hue)
    if centre is None:
        return None
    off = _turn(hue - centre)
    part = np.clip((FAR - np.abs(off)) / (FAR - NEAR), 0, 1)
    own = (chroma > PALE) & (np.abs(off) < NEAR)
    usual, strong = float(np.median(lightness[own])), float(np.median(chroma[own]))
    wanted, rich, angle = _named(colour)
    # Where the outline is mixed with white, or a gleam lies, less is moved, in proportion.
    mixed = part * np.clip(chroma / strong, 0, 1)
    lightness = lightness + mixed * 0.8 * (wanted - usual)
    chroma = chroma * (1 + part * (np.clip(rich / strong, 0.6, 2.0) - 1))
    turned = centre + off * (1 - 0.5 * part) + part * _turn(angle - centre)
    rgb = cv2.cvtColor(_cartesian(lightness, chroma, turned).astype(np.float32), cv2.COLOR_LAB2RGB)
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


def _main_hue(
    lightness: Float[np.ndarray, "H W"], chroma: Float[np.ndarray, "H W"], hue: Float[np.ndarray, "H W"]
) -> float | None:
    """The hue in degrees that most of the thing has, None if no hue has enough of it."""
    thing = (lightness < 97) | (chroma > 3)
    coloured = chroma > PALE
    if not coloured.any():
        return None
    counts = np.bincount((hue[coloured] % 360).astype(int) % 360, minlength=360).astype(float)
    around = np.convolve(np.tile(counts, 3), np.hanning(41), "same")[360:720]
    centre = float(around.argmax())
    return centre if (coloured & (np.abs(_turn(hue - centre)) < NEAR)).sum() >= SHARE * thing.sum() else None


def _polar(picture: Picture) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    """Lightness, chroma and hue (degrees), of CIELAB."""
    lab = cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB).astype(np.float64)
    return lab[..., 0], np.hypot(lab[..., 1], lab[..., 2]), np.degrees(np.arctan2(lab[..., 2], lab[..., 1]))


def _cartesian(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray | float) -> np.ndarray:
    angle = np.radians(hue)
    return np.stack([lightness, chroma * np.cos(angle), chroma * np.sin(angle)], -1)


def _named(colour: str) -> tuple[float, float, float]:
    """Lightness, chroma and hue of a colour of `PALETTE`."""
    pixel = np.array([[ImageColor.getrgb(PALETTE[colour])]], np.uint8)
    return tuple(float(each[0, 0]) for each in _polar(pixel))  # pyright: ignore[reportReturnType]


def _turn(degrees: np.ndarray | float) -> np.ndarray:
    """The same angle in -180 to 180."""
    return (np.asarray(degrees) + 180) % 360 - 180
