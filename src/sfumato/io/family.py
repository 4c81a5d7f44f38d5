"""Which family a model belongs to, by the width of its cross-attention: the one place that knows these numbers."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from typing import Any

from sfumato.io.lazy import LazyTensor


class Family(enum.StrEnum):
    """The families of models that sfumato runs; equal to their short names as strings."""

    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    SDXL_REFINER = "sdxl-refiner"

    @property
    def full_name(self) -> str:
        """The name for people, such as "Stable Diffusion 1.x"."""
        return FULL_NAMES[self]


FULL_NAMES = {
    Family.SD1: "Stable Diffusion 1.x",
    Family.SD2: "Stable Diffusion 2.x",
    Family.SDXL: "Stable Diffusion XL",
    Family.SDXL_REFINER: "Stable Diffusion XL refiner",
}
FAMILY_OF_CONTEXT = {768: Family.SD1, 1024: Family.SD2, 2048: Family.SDXL, 1280: Family.SDXL_REFINER}
"""By the width of the text features that cross-attention looks at."""

FAMILY_OF_TEXT = {768: Family.SD1, 1024: Family.SD2, 1280: Family.SDXL}
"""By the width of a text encoder or an embedding that comes alone. SDXL's first encoder is that of SD 1.x."""


class Purpose(enum.StrEnum):
    """What a UNet is for."""

    TEXT = "text to image"
    DEPTH = "depth to image"
    EDIT = "InstructPix2Pix"
    INPAINT = "inpainting"


CONTEXT_KEY = re.compile(r"(^|[._])attn2[._](processor[._])?to_[kv]([._]|$)")
"""Layers that look at text features, in checkpoints and adapters of every naming."""


def purpose_of(inputs: Any, latents: Any = 4) -> Purpose | None:
    """The purpose of a UNet by the numbers of its input and latent channels; None if there is no such."""
    if not (isinstance(inputs, int) and isinstance(latents, int)):
        return None
    known = {0: Purpose.TEXT, 1: Purpose.DEPTH, latents: Purpose.EDIT, latents + 1: Purpose.INPAINT}
    return known.get(inputs - latents)


def family_of_context(width: Any) -> Family | None:
    """The family whose text features have this width; diffusers' configs may give the width as a list."""
    widths = {n for n in (width if isinstance(width, list | tuple) else [width]) if isinstance(n, int)}
    return FAMILY_OF_CONTEXT.get(widths.pop()) if len(widths) == 1 else None


def family_of_tensors(tensors: Mapping[str, LazyTensor]) -> Family | None:
    """The family of a UNet or ControlNet by its keys and shapes, in the original or diffusers layout.

    None if it has no cross-attention, or one of a width that none of the families has.
    """
    widths = {
        tensor.shape[1] for key, tensor in tensors.items()
        if key.endswith(".attn2.to_k.weight") and len(tensor.shape) == 2
    }  # fmt: skip
    return family_of_context(list(widths))
