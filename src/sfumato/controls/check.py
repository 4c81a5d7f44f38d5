"""Checks of what a user gave, each one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from sfumato import image
from sfumato.errors import SfumatoError
from sfumato.types import Window


def finite(what: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """The number. Raises SfumatoError for what is no finite number in [low, high]."""
    try:
        plain = float(value)
    except (TypeError, ValueError):
        raise SfumatoError(f"{what} must be a number, not {value!r}.") from None
    if not math.isfinite(plain):
        raise SfumatoError(f"{what} must be a finite number, not {plain}.")
    if not low <= plain <= high:
        raise SfumatoError(f"{what} must lie in [{low:g}, {high:g}], not be {plain:g}.")
    return plain


def number(what: str, value: Any, low: float = -math.inf, high: float = math.inf) -> Float[Array, ""]:
    """The number as a float32 scalar, a leaf of the loop. Raises SfumatoError as `finite`."""
    return scalar(finite(what, value, low, high))


def scalar(value: float) -> Float[Array, ""]:
    """The number on the device; what jax.numpy has for it would compile a program."""
    return jax.device_put(np.float32(value))


def whole(what: str, value: Any, low: int = 0) -> np.int32:
    """The number, cut to what an int32 holds. Raises SfumatoError for what is no whole number from `low` on."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        raise SfumatoError(f"{what} must be a whole number from {low} on, not {value!r}.")
    return np.int32(min(value, np.iinfo(np.int32).max))


def window(what: str, value: Window) -> Window:
    """The window with float32 ends. Raises SfumatoError unless 0 <= start <= stop <= 1."""
    start = finite(f"The start of {what}", value.start, 0, 1)
    stop = finite(f"The stop of {what}", value.stop, 0, 1)
    if start > stop:
        raise SfumatoError(f"The window of {what} starts at {start:g} and stops before that, at {stop:g}.")
    return Window(scalar(start), scalar(stop))


def pictures(
    what: str, value: Any, batch: int, size: tuple[int, int], *, signed: bool
) -> Float32[np.ndarray, "B H W 3"]:
    """One picture for each of the batch, at `size`: from one picture for all, or a list of as many as there are.

    Pictures of another size are resized to cover it. In [-1, 1] if `signed`, otherwise in [0, 1]. Raises
    SfumatoError for what cannot be read and for another number of pictures.
    """
    listed = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    many = list(value) if listed else [value]
    if listed and len(many) not in (1, batch):
        raise SfumatoError(f"{what}: {len(many)} pictures were given for {batch} to be made; give one, or {batch}.")
    arrays = [image.to_array(image.resize(image.read(one), size), signed=signed) for one in many]
    return np.stack(arrays if len(arrays) == batch else arrays * batch)
