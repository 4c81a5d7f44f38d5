"""Inpainting, for models of 9 input channels and for all others."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt8

from sfumato import image as pixels
from sfumato.controls import check
from sfumato.controls.base import Control, Latents, Request, State
from sfumato.controls.channels import Channels
from sfumato.errors import SfumatoError
from sfumato.models.blocks import nearest
from sfumato.types import Step, pytree

FADES = (8.0, 4.0, 2.0, 1.0)
"""Pixels over which colours are carried on into the mask: first what is off over a latent, then what is left."""


@dc.dataclass(frozen=True)
class Inpaint(Control):
    """Repaints a picture where `mask` is white, and gives it back exactly where the mask is black; near the edge its
    colours are those of the known part (`continued`).

    `image` is one picture for all or a list with one for each, `mask` a picture of the size of `image`. Models of 9
    channels see mask and masked picture; for all others the known part is put back, at the right noise, after every
    step (arXiv:2201.09865, eq. 8, without resampling; arXiv:2112.10752, section 4.5).
    """

    image: Any
    mask: Any

    def prepare(self, request: Request) -> Control:
        channels, latents = request.model.unet.config.in_channels, request.noise.shape[-1]
        image, mask = self._arrays(request.batch, request.size)
        height, width = request.noise.shape[1:3]
        small = nearest(jnp.asarray(mask), (height, width))
        if channels != 2 * latents + 1:
            return KnownPart(request.encode_image(image), small, request.noise)
        masked = request.encode_image(image * (mask < 0.5))
        return Channels(jnp.concatenate([small, masked], axis=-1))

    def finish(self, pictures: UInt8[np.ndarray, "B H W 3"]) -> UInt8[np.ndarray, "B H W 3"]:
        image, mask = self._arrays(len(pictures), (pictures.shape[2], pictures.shape[1]))
        known = np.round((image + 1) * 127.5).astype(np.uint8)
        painted = [continued(*each) for each in zip(pictures, known, mask, strict=True)]
        return np.where(mask > 0.5, np.stack(painted), known)

    def _arrays(
        self, batch: int, size: tuple[int, int]
    ) -> tuple[Float32[np.ndarray, "B H W 3"], Float32[np.ndarray, "B H W 1"]]:
        """The pictures in [-1, 1] and the mask in {0, 1}."""
        first = self.image[0] if isinstance(self.image, list | tuple) else self.image
        picture, mask = pixels.read(first), pixels.read_mask(self.mask)
        if picture.size != mask.shape[1::-1]:
            sizes = "{}x{}".format(*picture.size), "{1}x{0}".format(*mask.shape)
            raise SfumatoError(f"The mask must have the size of the picture, {sizes[0]}, and not {sizes[1]}.")
        stretched = pixels.resize(pixels.read(np.repeat(mask, 3, axis=2)), size)
        mask = pixels.read_mask(stretched)
        return check.pictures("Inpaint", self.image, batch, size, signed=True), np.repeat(mask[None], batch, axis=0)


def continued(
    picture: UInt8[np.ndarray, "H W 3"], known: UInt8[np.ndarray, "H W 3"], mask: Float32[np.ndarray, "H W 1"]
) -> UInt8[np.ndarray, "H W 3"]:
    """The picture, with what it lacks of the known one at the edge of the mask carried on into the mask, and faded out
    over `FADES`.

    An autoencoder does not give colours back exactly, and where its picture meets the known one, that is a seam. Near
    the edge the picture is off inside of the mask by as much as it is outside, where that can be seen.
    """
    import cv2

    outside, found = 1 - mask[..., 0], picture.astype(np.float32)
    for fade in FADES:
        off = cv2.GaussianBlur((known - found) * outside[..., None], (0, 0), fade)
        near = cv2.GaussianBlur(outside, (0, 0), fade)[..., None]
        # On a straight edge half of what is near lies outside.
        found += np.minimum(2 * near, 1) * off / np.maximum(near, 1e-3)
    return np.round(found).clip(0, 255).astype(np.uint8)


@pytree
class KnownPart(Control):
    """After every step: x = mask x + (1 - mask) (alpha known + sigma noise), without noise after the last."""

    known: Float[Array, "B h w C"]
    mask: Float[Array, "B h w 1"]
    noise: Float[Array, "B h w C"]

    per_picture = frozenset({"known", "mask", "noise"})

    def project(self, x: Latents, step: Step, state: State) -> tuple[Latents, State]:
        noised = step.alpha_next * self.known + step.sigma_next * self.noise
        known = jnp.where(step.last, self.known, noised)
        return self.mask * x + (1 - self.mask) * known, state
