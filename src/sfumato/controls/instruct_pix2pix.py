"""InstructPix2Pix: a picture edited by what is said of it, for models of 8 channels."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, Request, State
from sfumato.controls.check import number, pictures
from sfumato.errors import SfumatoError
from sfumato.types import Conditioning, Prediction, Step, pytree

IMAGE = "image"
"""The branch that sees the picture and not the instruction."""


@pytree
class InstructPix2Pix(Control):
    """out = uncond + image_scale (image - uncond) + text_scale (cond - image) (arXiv:2211.09800, eq. 3).

    The prompt is the instruction. `image` is the picture to be edited, one for all or a list with one for each. Three
    rows of the network's batch see: picture and instruction, the picture alone, neither; "neither" has the negative
    prompt and latents of zeros. Both scales 1 is no guidance. It takes the place of CFG.

    The picture's latents are not multiplied by the autoencoder's scaling factor, as in training, but for models whose
    options say `is_cosxl_edit`. The reference drops all guidance if one of the scales is 1 or less; we follow the
    equation.
    """

    image: Any
    image_scale: Float[Array, ""] | float = 1.5
    text_scale: Float[Array, ""] | float = 7.5

    per_picture = frozenset({"image"})
    sets_channels = True
    excludes: ClassVar[Mapping[str, str]] = {
        "CFG": "InstructPix2Pix has its own guidance, by text_scale and image_scale"
    }

    def prepare(self, request: Request) -> InstructPix2Pix:
        latents, channels = request.noise.shape[-1], request.model.unet.config.in_channels
        if channels != 2 * latents:
            raise SfumatoError(
                f"InstructPix2Pix needs a model of {2 * latents} input channels that was trained for it, and this one "
                f"has {channels}."
            )
        image = request.encode_image(pictures("InstructPix2Pix", self.image, request.batch, request.size, signed=True))
        if not request.model.options.get("is_cosxl_edit"):
            image = request.model.vae.unscale(image)
        return InstructPix2Pix(
            image, number("InstructPix2Pix's image_scale", self.image_scale),
            number("InstructPix2Pix's text_scale", self.text_scale),
        )  # fmt: skip

    def branches(self, base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        return {IMAGE: base[UNCOND], UNCOND: base[UNCOND]}

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:
        none = jnp.zeros_like(self.image)
        return {name: dc.replace(cond, channels=none if name == UNCOND else self.image) for name, cond in conds.items()}

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents, State]:
        cond, image, uncond = preds[COND].eps, preds[IMAGE].eps, preds[UNCOND].eps
        return (self.text_scale - 1) * (cond - image) + (self.image_scale - 1) * (image - uncond), state
