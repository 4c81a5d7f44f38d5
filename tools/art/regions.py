"""Region maps: what a picture consists of, as flat areas of a few colours on a black ground.

A map of an SVG text is drawn from the art's own shapes, each in one colour of `PALETTE`. A map of any other picture is
made from its pixels. Both look the same, and one can paint such a map by hand.
"""

from __future__ import annotations

from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageFilter

from sfumato.annotators.regions import COLOURS, nearest
from tools.art.draw import mask, on_white, rasterise
from tools.art.styles import VIEW, Art

FAINT = 0.5
"""A shape that is less opaque is shading, not a region."""
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
