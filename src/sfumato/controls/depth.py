"""Depth-to-image, for models of 5 channels."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from sfumato import image as pixels
from sfumato.controls.base import Control, Request
from sfumato.controls.channels import Channels
from sfumato.errors import SfumatoError


@dc.dataclass(frozen=True)
class Depth(Control):
    """A depth map beside the latents, in [-1, 1] at their size (arXiv:2112.10752, section 3.3; Stable Diffusion 2's
    depth model).

    `depth` is a map [H, W] of any range (the greater, the nearer), a picture whose brightness is one, a list with one
    for each picture, or an estimator: a function from a PIL picture to a map, which is asked about `image` (one picture
    or a list). Every map is stretched to [-1, 1] after it was resized; a flat one is 0 everywhere.
    """

    depth: Any
    image: Any = None

    def prepare(self, request: Request) -> Channels:
        latents, channels = request.noise.shape[-1], request.model.unet.config.in_channels
        if channels != latents + 1:
            raise SfumatoError(
                f"Depth needs a model of {latents + 1} input channels, such as Stable Diffusion 2's depth model, and "
                f"this one has {channels}."
            )
        maps = self._maps
        if len(maps) not in (1, request.batch):
            raise SfumatoError(
                f"Depth: {len(maps)} maps were given for {request.batch} pictures; give one, or {request.batch}."
            )
        width, height = request.noise.shape[2], request.noise.shape[1]
        small = [_unit(_resized(each, (width, height), request.size)) for each in maps]
        return Channels(jnp.asarray(np.stack(small * (request.batch if len(small) == 1 else 1))))

    @functools.cached_property
    def _maps(self) -> list[Float32[np.ndarray, "_ _"]]:
        """The maps as they were given or estimated, which is done once."""
        if callable(self.depth):
            if self.image is None:
                raise SfumatoError("Depth was given an estimator and no picture to ask it about; give image= as well.")
            return [_map(self.depth(pixels.read(one))) for one in _listed(self.image)]
        if self.depth is None or not len(_listed(self.depth)):
            raise SfumatoError("Depth was given no depth; give a map [H, W], a picture of one, or an estimator.")
        return [_map(one) for one in _listed(self.depth)]


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value]


def _map(value: Any) -> Float32[np.ndarray, "_ _"]:
    """A depth map, out of an array of any range or the brightness of a picture. Raises SfumatoError for others."""
    if not hasattr(value, "__array__") or hasattr(value, "mode"):
        return np.asarray(pixels.read(value).convert("L"), np.float32)
    array = np.asarray(value)
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    if array.ndim == 3:
        return np.asarray(pixels.read(array).convert("L"), np.float32)
    if array.ndim != 2 or not array.size:
        raise SfumatoError(f"A depth map is an array [H, W], not of shape {array.shape}.")
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise SfumatoError("The depth map holds numbers that are not finite.")
    return array


def _resized(
    depth: Float32[np.ndarray, "_ _"], size: tuple[int, int], picture: tuple[int, int]
) -> Float32[np.ndarray, "_ _"]:
    """The map at `size`, cropped evenly to the proportions of the picture.

    Bicubic without smoothing, as the model was trained and as the reference has it.
    """
    import cv2

    height, width = depth.shape
    scale = max(picture[0] / width, picture[1] / height)
    wide, high = min(round(picture[0] / scale), width), min(round(picture[1] / scale), height)
    left, top = (width - wide) // 2, (height - high) // 2
    return cv2.resize(depth[top : top + high, left : left + wide], size, interpolation=cv2.INTER_CUBIC)


def _unit(depth: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, "h w 1"]:
    low, high = depth.min(), depth.max()
    return (2 * (depth - low) / (high - low) - 1 if high > low else np.zeros_like(depth))[..., None]
