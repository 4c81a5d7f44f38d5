"""Pictures: reading, resizing, masks, grids, writing. Sizes are (width, height), arrays [H W C]."""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageOps

from sfumato.errors import FileError, SfumatoError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
"""What can be written, by the ending of the name."""


def read(source: Any, *, background: str = "white") -> Image.Image:
    """A picture of any kind as RGB, upright, transparent parts filled with `background`.

    `source` is a path, bytes of a picture file, a PIL picture, or an array [H W], [H W 1], [H W 3] or [H W 4]: of
    8- or 16-bit integers, booleans, or floats in [0, 1]. Raises FileError for what cannot be read and SfumatoError for
    what is no picture.
    """
    picture, name = _open(source)
    try:
        picture = ImageOps.exif_transpose(picture)
        picture = _eight_bits(picture, name)
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, background)
        return Image.alpha_composite(ground, picture).convert("RGB")
    except SfumatoError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise FileError(f"{name} is damaged and cannot be read as a picture ({error}).") from None


def _open(source: Any) -> tuple[Image.Image, str]:
    """The picture as it is stored, and what to call it in messages."""
    if isinstance(source, Image.Image):
        return source, "The picture"
    if not isinstance(source, str | os.PathLike | bytes):
        return _of_array(source), "The picture"
    named = not isinstance(source, bytes)
    name = str(source) if named else f"The picture of {len(source)} bytes"
    try:
        picture = Image.open(source if named else io.BytesIO(source))
        picture.load()
    except FileNotFoundError:
        raise FileError(f"{name} is not there.") from None
    except Image.UnidentifiedImageError:
        raise FileError(f"{name} is not a picture in a known format.") from None
    except Image.DecompressionBombError:
        raise FileError(
            f"{name} is refused: it would unpack to more than {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise FileError(f"{name} cannot be read as a picture ({error}).") from None
    return picture, name


def _of_array(source: Any) -> Image.Image:
    """A picture out of an array. Raises SfumatoError for a shape, type or values that are none."""
    if not hasattr(source, "__array__"):
        raise SfumatoError(f"A picture is a path, bytes, a PIL picture or an array, not a {type(source).__name__}.")
    array = np.asarray(source)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))):
        raise SfumatoError(f"A picture is an array [H W], [H W 1], [H W 3] or [H W 4], not of shape {array.shape}.")
    if jnp.issubdtype(array.dtype, jnp.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise SfumatoError(f"A picture of floats has values in [0, 1], but this has {low:.4g} to {high:.4g}.")
        array = np.round(array.astype(np.float32) * 255)
    elif array.dtype == np.uint16:
        array = np.round(array / 257)
    elif array.dtype == bool:
        array = array * 255
    elif array.dtype != np.uint8:
        raise SfumatoError(f"A picture's values are uint8, uint16, bool or floats in [0, 1], not {array.dtype}.")
    return Image.fromarray(np.ascontiguousarray(array, np.uint8))


def _eight_bits(picture: Image.Image, name: str) -> Image.Image:
    """Gray pictures of 16 bits as 8: PIL would cut them off at 255 instead."""
    if picture.mode == "F":
        raise FileError(f"{name} has floating-point values without a known range; pass an array in [0, 1] instead.")
    if not picture.mode.startswith("I"):
        return picture
    values = np.asarray(picture).astype(np.float64)
    if picture.mode == "I" and values.max() <= 255:
        return Image.fromarray(values.clip(0).astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise FileError(f"{name} has {picture.mode} values outside of the 16 bits that a picture has.")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def to_array(source: Any, *, signed: bool = True) -> Float32[np.ndarray, "H W 3"]:
    """A picture as numbers in [-1, 1], what an autoencoder takes; or in [0, 1], what a ControlNet takes.

    Raises as `read`.
    """
    array = np.asarray(read(source), np.float32) / 255
    return 2 * array - 1 if signed else array


def read_mask(source: Any, *, soft: bool = False) -> Float32[np.ndarray, "H W 1"]:
    """A mask: 1 where `source` is white, 0 where it is black or transparent, and between the two if it is `soft`.

    Otherwise gray counts as white from one half on. Takes and raises the same as `read`.
    """
    array = np.asarray(read(source, background="black").convert("L"), np.float32)[..., None] / 255
    return array if soft else (array >= 0.5).astype(np.float32)


def resize(picture: Image.Image, size: tuple[int, int], how: str = "cover", *, fill: str = "white") -> Image.Image:
    """The picture at `size`, resampled with Lanczos.

    "cover" keeps the proportions and crops evenly what sticks out, "contain" keeps them and fills the rest with
    `fill`, "stretch" does not keep them. Raises SfumatoError for another way or a size that is none.
    """
    check_size(size)
    lanczos = Image.Resampling.LANCZOS
    if how == "stretch":
        return picture.resize(size, lanczos)
    if how == "cover":
        return ImageOps.fit(picture, size, lanczos)
    if how == "contain":
        return ImageOps.pad(picture, size, lanczos, color=fill)
    raise SfumatoError(f"A picture is resized by cover, contain or stretch, not {how!r}.")


def check_size(size: Any, multiple: int = 1, what: str = "The picture") -> tuple[int, int]:
    """The size as two integers. Raises SfumatoError if it is none, or with the nearest sizes whose sides are multiples
    of `multiple`."""
    try:
        width, height = (int(side) if int(side) == side else 0 for side in size)
    except (TypeError, ValueError, OverflowError):
        width = height = 0
    if width < 1 or height < 1:
        raise SfumatoError(f"A size is (width, height) in whole pixels, such as (512, 512), not {size!r}.")
    if width % multiple or height % multiple:
        below, above = (
            tuple(max(round_(side / multiple), 1) * multiple for side in (width, height))
            for round_ in (math.floor, math.ceil)
        )
        nearest = " and ".join("{}x{}".format(*sides) for sides in sorted({below, above}))
        raise SfumatoError(
            f"{what} has {width}x{height} pixels, but width and height must be multiples of {multiple}; "
            f"the nearest sizes are {nearest}."
        )
    return width, height


def grid(pictures: Sequence[Image.Image], columns: int | None = None) -> Image.Image:
    """The pictures in rows on white, by default as near to a square as can be. Raises SfumatoError for none of them,
    or less than one column."""
    if not pictures:
        raise SfumatoError("A grid needs at least one picture.")
    if columns is not None and columns < 1:
        raise SfumatoError(f"A grid needs at least one column, not {columns}.")
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    width, height = (max(sides) for sides in zip(*(picture.size for picture in pictures), strict=True))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height), "white")
    for number, picture in enumerate(pictures):
        row, column = divmod(number, columns)
        sheet.paste(picture, (column * width, row * height))
    return sheet


def format_of(path: str | Path) -> str:
    """The format that a name's ending stands for. Raises SfumatoError for one that cannot be written."""
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise SfumatoError(f"{path} does not end in {', '.join(FORMATS)}, so it is unclear how to write the picture.")
    return FORMATS[path.suffix.lower()]


def write(picture: Image.Image, path: str | Path, **options: Any) -> Path:
    """Writes a picture in the format of its name's ending; `options` are those of PIL.

    The file appears, or takes the place of an older one, only when it is complete. Missing folders are made. Raises
    SfumatoError for another ending or a place that cannot be written to.
    """
    path, kind = Path(path), format_of(path)
    options = ({} if kind == "PNG" else {"quality": 95}) | options
    return write_atomically(path, lambda file: picture.save(file, kind, **options))


def write_atomically(path: Path, fill: Callable[[Any], None]) -> Path:
    """Lets `fill` write to a file that becomes `path` once it is complete. Raises SfumatoError if it cannot."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name[:100]}-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except OSError as error:
        raise SfumatoError(f"{path} cannot be written ({error.strerror or error}).") from None
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
    return path
