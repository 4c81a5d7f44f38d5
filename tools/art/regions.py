"""Region maps: what a picture consists of, as flat areas of a few colours on a black ground.

A map of an SVG text is drawn from the art's own shapes, each in one colour of `PALETTE`. A map of any other picture is
made from its pixels. Both look the same, and one can paint such a map by hand.
"""

from __future__ import annotations

import functools
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageColor, ImageFilter

from tools.art.draw import mask, on_white, rasterise
from tools.art.styles import VIEW, Art

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
FAINT = 0.5
"""A shape that is less opaque is shading, not a region."""
LIGHTNESS = 0.6
"""How much a difference of lightness counts beside one of hue: shaded green is green still."""
OVERLAP = 0.9
"""The overlap of two outlines from which on one drawing's shapes are taken for the other's."""


def regions(art: Art, picture: Image.Image, twin: Art | None = None) -> Image.Image:
    """The RGB map of regions of the art, whose RGBA picture this is.

    `twin` is an SVG drawing of the same shapes, whose regions are taken if the art itself is no SVG and they fit.
    """
    inside = np.array(mask(picture)) >= 128
    svg = art.svg
    if svg is None and twin is not None and twin.svg is not None:
        outline = np.array(mask(rasterise(twin.svg, picture.width))) >= 128
        fits = (outline & inside).sum() >= OVERLAP * (outline | inside).sum()
        svg = twin.svg if fits else None
    if svg is None:
        return of_picture(picture)
    shapes = _shapes(svg, picture.width)
    known = _grown(_coloured(shapes, nearest(np.array(on_white(picture))) * inside))
    # Where the art is but no shape is left, the pixels tell.
    places = known if known[inside].all() else np.where(known > 0, known, _places(picture))
    return _map(places, inside)


def of_picture(picture: Image.Image) -> Image.Image:
    """The RGB map of regions of an RGBA picture, from its pixels."""
    return _map(_places(picture), np.array(mask(picture)) >= 128)


def _map(places: np.ndarray, inside: np.ndarray) -> Image.Image:
    return Image.fromarray(COLOURS[np.where(inside, places, 0)])


def _places(picture: Image.Image) -> np.ndarray:
    """The number in the palette that each pixel has once the picture is smoothed."""
    smooth = on_white(picture).filter(ImageFilter.MedianFilter(5))
    places = np.array(Image.fromarray(nearest(np.array(smooth))).filter(ImageFilter.ModeFilter(5)))
    # Along the outline the white ground has been mixed in; what lies further inside tells there.
    core = np.array(mask(picture).filter(ImageFilter.MinFilter(5))) >= 128
    grown = _grown(places * core, 4)
    return np.where(grown > 0, grown, places)


def _grown(places: np.ndarray, steps: int = 2) -> np.ndarray:
    """Regions that reach a few pixels further into what is none: outlines with and without smoothing differ."""
    for _ in range(steps):
        around = np.pad(places, 1)
        for beside in (around[:-2, 1:-1], around[2:, 1:-1], around[1:-1, :-2], around[1:-1, 2:]):
            places = np.where(places == 0, beside, places)
    return places


def _shapes(svg: str, size: int) -> np.ndarray:
    """The number of the shape, from 1 on, that each pixel belongs to; 0 for none. [size size]"""
    text, paints = flat(svg)
    drawn = np.array(rasterise(text, size, crisp=True)).astype(np.int64)
    colours = (drawn[..., 0] << 16) + (drawn[..., 1] << 8) + drawn[..., 2]
    order = np.argsort(paints)
    found = order[np.searchsorted(paints, colours, sorter=order).clip(max=len(paints) - 1)]
    # A colour that is none of the paints is a blend of two shapes along the edge of a clip path.
    return np.where((drawn[..., 3] == 255) & (np.array(paints)[found] == colours), found + 1, 0)


def _coloured(shapes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Each shape in the one colour of the palette that most of its pixels have in the picture."""
    votes = np.zeros((shapes.max() + 1, len(COLOURS)), np.int64)
    np.add.at(votes, (shapes, places), 1)
    votes[:, 0] = 0
    best = np.argmax(votes, axis=1)
    best[0] = 0
    return best[shapes].astype(np.uint8)


def nearest(rgb: np.ndarray) -> np.ndarray:
    """For each colour of uint8 [..., 3] the number, from 1 on, of that of the palette that looks most like it."""
    red, green, blue = np.moveaxis(rgb >> 3, -1, 0)
    return _table()[red, green, blue]


@functools.cache
def _table() -> np.ndarray:
    """The answers of `nearest`, uint8 [32 32 32], to colours in steps of 8."""
    steps = np.arange(32) * 8 + 4
    colours = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    difference = _oklab(colours)[:, None] - _oklab(COLOURS[1:])[None]
    return (np.argmin((difference**2).sum(-1), axis=1) + 1).astype(np.uint8).reshape(32, 32, 32)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Oklab (https://bottosson.github.io/posts/oklab) of sRGB in 0 to 255, [N, 3], its lightness scaled."""
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


def flat(svg: str) -> tuple[str, list[int]]:
    """The SVG text with each shape in a colour of its own, without gradients and filters, and these colours."""
    root = ElementTree.fromstring(svg)
    flattener = _Flattener({element.get("id", ""): element for element in root.iter()})
    root.set("fill", flattener.paint("black", 1.0))
    flattener.flatten(root, 1.0)
    ElementTree.register_namespace("", VIEW)
    return ElementTree.tostring(root, encoding="unicode"), flattener.paints


class _Flattener:
    """Flattens the elements of one SVG text, of which `named` are those that have an id."""

    def __init__(self, named: dict[str, ElementTree.Element]):
        self.named, self.paints = named, list[int]()

    def flatten(self, parent: ElementTree.Element, opacity: float) -> None:
        for child in list(parent):
            kind, clear = child.tag.rpartition("}")[2], opacity * _number(child.get("opacity"))
            if kind in ("clipPath", "mask", "filter", "linearGradient", "radialGradient"):
                continue
            if clear < FAINT or self.is_blurred(child):
                parent.remove(child)
                continue
            for name in ("opacity", "filter"):
                child.attrib.pop(name, None)
            for paint in ("fill", "stroke"):
                value, visible = child.get(paint), clear * _number(child.attrib.pop(f"{paint}-opacity", None))
                if value not in (None, "none"):
                    child.set(paint, self.paint(value, visible))
            self.flatten(child, clear)

    def paint(self, value: str, opacity: float) -> str:
        """A colour of its own for a colour or gradient, or "none" for what is faint."""
        name = _reference(value)
        if name is not None:
            opacity *= self.opacity(name)
        if opacity < FAINT:
            return "none"
        # Colours far from one another: no blend of two is taken for a third.
        self.paints.append((len(self.paints) + 1) * 0x9E3779 % 0x1000000)
        return f"#{self.paints[-1]:06x}"

    def opacity(self, name: str) -> float:
        """The mean opacity of a gradient over the way from its start to its end."""
        gradient = self.named.get(name)
        if gradient is None:
            return 0.0
        stops = [element for element in gradient if element.tag.endswith("}stop")]
        if not stops:
            link = next((value for key, value in gradient.items() if key.endswith("href")), "")
            return self.opacity(link[1:]) if link[1:] != name else 0.0
        places = [_number(stop.get("offset", "0")) for stop in stops]
        return float(np.interp(np.linspace(0, 1, 101), places, [_number(s.get("stop-opacity")) for s in stops]).mean())

    def is_blurred(self, element: ElementTree.Element) -> bool:
        """Whether it is smeared out altogether, as gleams and shadows are."""
        effects = self.named.get(_reference(element.get("filter", "")) or "")
        return effects is not None and any("foregroundBlur" in effect.get("result", "") for effect in effects)


def _reference(text: str) -> str | None:
    return text[5:].rstrip(")").strip("'\"") if text.startswith("url(#") else None


def _number(text: str | None) -> float:
    return 1.0 if text is None else float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
