"""From an example to a row of a batch: cropped, perhaps mirrored, with its conditioning picture."""

from __future__ import annotations

import dataclasses as dc
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from sfumato.errors import FileError
from sfumato.image import read
from sfumato.train.buckets import Size
from sfumato.train.examples import Example

STRETCH = 0.03
"""By how much the proportions of a conditioning picture may differ from its picture's, for it was rounded to pixels."""

ORIENTATION = 0x0112
"""The EXIF tag; from 5 to 8 it lays a picture on its side."""


@dc.dataclass(frozen=True)
class Cut:
    """The part of a picture that is trained on: the picture is resized to `resized` so that it covers `size`, mirrored
    if `flip`, and cropped to `size` from (`left`, `top`) on."""

    resized: Size
    size: Size
    left: int
    top: int
    flip: bool

    def apply(self, picture: Image.Image) -> Image.Image:
        """The part, resampled once with Lanczos; a conditioning picture has its own number of pixels."""
        (across, down), (width, height) = self.resized, self.size
        left = across - width - self.left if self.flip else self.left
        box = (
            left / across * picture.width,
            self.top / down * picture.height,
            (left + width) / across * picture.width,
            (self.top + height) / down * picture.height,
        )
        part = picture.resize(self.size, Image.Resampling.LANCZOS, box=box)
        return ImageOps.mirror(part) if self.flip else part


def cut(
    picture: Size, size: Size, draws: Float32[np.ndarray, " 4"], *, flip: bool, crop: bool, zoom: float = 1.0
) -> Cut:
    """What is trained on of a picture of that size. `draws` are uniform in [0, 1): mirror, top, left, zoom. Without
    `crop` it is the middle. `zoom` is the largest factor by which the picture is enlarged beyond covering the size."""
    scale = max(size[0] / picture[0], size[1] / picture[1]) * zoom ** float(draws[3])
    resized = (max(round(picture[0] * scale), size[0]), max(round(picture[1] * scale), size[1]))
    spare = resized[0] - size[0], resized[1] - size[1]
    top, left = (math.floor(draws[1] * (spare[1] + 1)), math.floor(draws[2] * (spare[0] + 1)))
    if not crop:
        left, top = spare[0] // 2, spare[1] // 2
    return Cut(resized, size, left, top, flip and bool(draws[0] < 0.5))


@dc.dataclass(frozen=True)
class Prepare:
    """How examples become rows: every draw is made from (seed, epoch, number of the example), whatever the order."""

    seed: int
    flip: bool = False
    crop: bool = False
    zoom: float = 1.0
    annotators: tuple[Callable[[Image.Image], Any], ...] = ()

    @property
    def turns(self) -> int:
        """How many different rows an example becomes, one after another."""
        return max(len(self.annotators), 1)

    def turn(self, epoch: int, number: int) -> int:
        """Whose turn it is among the annotators: in an epoch all come alike often."""
        return (epoch + number) % self.turns

    def __call__(self, example: Example, size: Size, epoch: int, number: int) -> dict[str, Any]:
        """A row: pixels [H W 3] in [-1, 1], text, conditioning [H W 3] in [0, 1] where there is one, sizes [6], index.

        The annotators, if there are any, take turns, and see what is trained on, at the size it is trained at. Raises
        FileError for a picture that cannot be read, or a conditioning picture of other proportions.
        """
        draws = np.random.default_rng((0, self.seed, epoch, number)).random(5, np.float32)
        picture = opened(example.image, example.name)
        part = cut(picture.size, size, draws[[0, 1, 2, 4]], flip=self.flip, crop=self.crop, zoom=self.zoom)
        pixels = part.apply(picture)
        row = {
            "pixels": _numbers(pixels) * 2 - 1,
            "text": self.text(example, epoch, number),
            "sizes": np.asarray([*picture.size[::-1], part.top, part.left, *size[::-1]], np.float32),
            "index": np.int64(number),
        }
        if self.annotators:
            row["conditioning"] = _numbers(read(self.annotators[self.turn(epoch, number)](pixels)))
        elif example.conditioning is not None:
            other = opened(example.conditioning, f"{example.name}'s conditioning picture")
            check_proportions(picture.size, other.size, example.name)
            row["conditioning"] = _numbers(part.apply(other))
        return row

    def text(self, example: Example, epoch: int, number: int) -> str:
        """The text of an example; of several another one each time."""
        if isinstance(example.text, str):
            return example.text
        draw = np.random.default_rng((0, self.seed, epoch, number)).random(4, np.float32)[3]
        return example.text[math.floor(draw * len(example.text))]


def _numbers(picture: Image.Image) -> Float32[np.ndarray, "H W 3"]:
    return np.asarray(picture, np.float32) / 255


def opened(source: Any, name: str) -> Image.Image:
    """The picture, by `sfumato.image.read`. Raises FileError with its sentence and, if that has no path in it, the
    name."""
    try:
        return read(source)
    except FileError as error:
        raise (error if isinstance(source, str) or hasattr(source, "__fspath__") else _named(error, name)) from None


def _named(error: FileError, name: str) -> FileError:
    return FileError(f"{name}: {str(error)[:1].lower()}{str(error)[1:]}")


def check_proportions(picture: Size, other: Size, name: str) -> None:
    """Raises FileError if the conditioning picture cannot be laid over the picture without a distortion."""
    # One pixel of rounding is much in a small picture.
    allowed = STRETCH + 1 / min(*picture, *other)
    if abs(math.log(picture[0] / picture[1] * other[1] / other[0])) > allowed:
        raise FileError(
            f"{name} has {picture[0]}x{picture[1]} pixels, but its conditioning picture {other[0]}x{other[1]}; "
            "they must have the same proportions."
        )


def upright_size(source: Any, name: str) -> Size:
    """The width and height of a picture as it will be read, mostly from its header alone. Raises as `opened`."""
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            # PIL would unpack a whole PNG to look for what may come at its end, though writers put it at the front;
            # the size of a TIFF is that of the upright picture already.
            known = "exif" in picture.info if picture.format == "PNG" else picture.format != "TIFF"
            turned = known and picture.getexif().get(ORIENTATION) in (5, 6, 7, 8)
            return (picture.height, picture.width) if turned else picture.size
    # Whatever is the matter with the header: reading it all has the sentence, or finds that nothing is.
    except Exception:
        return opened(source, name).size
