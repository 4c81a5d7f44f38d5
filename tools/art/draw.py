"""Pictures of art: an SVG text or a picture file becomes a square of pixels with its exact outline as alpha."""

from __future__ import annotations

import io

import resvg_py
from PIL import Image

from tools.art.styles import Art


def rasterise(svg: str, size: int, *, crisp: bool = False) -> Image.Image:
    """An RGBA picture of `size` x `size` pixels; `crisp` edges are not smoothed."""
    shapes = "crisp_edges" if crisp else "geometric_precision"
    data = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, shape_rendering=shapes, skip_system_fonts=True
    )
    return Image.open(io.BytesIO(data)).convert("RGBA")


def draw(art: Art, size: int) -> Image.Image:
    """The art as an RGBA picture of `size` x `size` pixels."""
    if art.svg is not None:
        return rasterise(art.svg, size)
    assert art.picture is not None
    picture = Image.open(io.BytesIO(art.picture)).convert("RGBA")
    # Colours are weighted by alpha, so that what is under the transparent parts does not bleed in.
    return picture.convert("RGBa").resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def on_white(picture: Image.Image) -> Image.Image:
    """The RGBA picture on a white ground, RGB."""
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB")


def mask(picture: Image.Image) -> Image.Image:
    """The outline: white where the picture is, black where its ground is."""
    return picture.getchannel("A")
