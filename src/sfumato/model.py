"""A model: everything that a picture needs, in memory."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import Any

from sfumato.errors import MismatchError
from sfumato.io.family import Family, family_of_context
from sfumato.models.clip import ClipTextEncoder
from sfumato.models.config import EncoderConfig
from sfumato.models.controlnet import ControlNet
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL
from sfumato.schedule import Schedule
from sfumato.text.tokenizer import Tokenizer
from sfumato.types import Window

GUIDANCE, GUIDED, STEPS = "guidance_scale", "guidance_stop", "num_inference_steps"
"""The settings of a checkpoint that say how much guidance it wants, up to what share of the steps, and how many steps.
diffusers has none for that, and passes over them."""


@dc.dataclass(frozen=True)
class Model:
    """A latent diffusion model of the Stable Diffusion family.

    The networks are Flax NNX modules and are not changed by anything in sfumato: what adapts a model returns a new one.
    """

    unet: UNet
    vae: AutoencoderKL
    text_encoders: Mapping[str, ClipTextEncoder]
    """By component name: "text_encoder", "text_encoder_2". SDXL has both, its refiner only the second."""
    tokenizers: Mapping[str, Tokenizer]
    """By component name: "tokenizer", "tokenizer_2", as the text encoders."""
    schedule: Schedule
    family: Family
    """One of "sd1", "sd2", "sdxl" and "sdxl-refiner"."""
    name: str = ""
    """Where the model came from: a path, a hub id."""
    options: Mapping[str, Any] = dc.field(default_factory=dict)
    """Further settings of the checkpoint's `model_index.json`, such as `force_zeros_for_empty_prompt`."""
    adapters: tuple[str, ...] = ()
    """What was applied to it since, for the metadata of pictures: LoRAs with their strengths, words."""

    @property
    def guidance(self) -> float:
        """The guidance scale that it draws best with: "guidance_scale" of its `model_index.json`, otherwise 7.5."""
        return self._number(GUIDANCE, 7.5)

    @property
    def guided(self) -> Window:
        """Where it draws best with guidance: up to "guidance_stop" of its `model_index.json`, otherwise always."""
        return Window(0.0, min(max(self._number(GUIDED, 1.0), 0.0), 1.0))

    @property
    def steps(self) -> int:
        """The steps it is meant to be drawn with: "num_inference_steps" of its `model_index.json`, otherwise 30."""
        said = self._number(STEPS, 30)
        return int(said) if said >= 1 else 30

    def _number(self, name: str, default: float) -> float:
        said = self.options.get(name)
        return float(said) if isinstance(said, int | float) and math.isfinite(said) else default

    @property
    def dtype(self) -> str:
        """The type that the model computes in, such as "bfloat16"."""
        return str(self.unet.dtype)


def family_of_config(config: EncoderConfig) -> Family:
    """The family of a UNet or ControlNet: by the width of its text features, otherwise by its structure."""
    known = family_of_context(config.cross_attention_dim)
    if known is not None:
        return known
    if config.addition_embed_type == "text_time":
        return Family.SDXL
    return Family.SD2 if config.use_linear_projection else Family.SD1


def family_of_model(config: EncoderConfig, text_encoders: Mapping[str, ClipTextEncoder]) -> Family:
    """The family of a whole model; one like SDXL with just the second text encoder is a refiner."""
    family = family_of_config(config)
    return Family.SDXL_REFINER if family == Family.SDXL and "text_encoder" not in text_encoders else family


def check_fits(net: ControlNet, model: Model, name: str = "This ControlNet") -> None:
    """Raises MismatchError, with both families, if `net` cannot steer `model`."""

    def shape(config: EncoderConfig) -> dict[str, Any]:
        levels = range(len(config.block_out_channels))
        return {
            "channels": config.block_out_channels, "blocks": tuple(map(config.layers, levels)),
            "text width": tuple(map(config.context_dim, levels)), "added conditioning": config.addition_embed_type,
        }  # fmt: skip

    theirs, ours = shape(net.config), shape(model.unet.config)
    apart = [f"{key} {theirs[key]} and not {ours[key]}" for key in ours if theirs[key] != ours[key]]
    if apart:
        kind = family_of_config(net.config).full_name
        raise MismatchError(
            f"{name} was made for {kind} and does not fit {model.name or 'the model'}, "
            f"which is {model.family.full_name}: it has {'; '.join(apart)}."
        )
