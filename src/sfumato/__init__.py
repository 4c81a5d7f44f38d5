"""sfumato: controlled image generation with latent diffusion, in JAX.

The public names, each loaded when it is first used, so that importing sfumato takes next to no time.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sfumato.version import __version__

if TYPE_CHECKING:
    from sfumato.adapters.lora import Lora
    from sfumato.adapters.lora_file import load_lora
    from sfumato.adapters.save_lora import save_lora
    from sfumato.adapters.textual_inversion import Embedding, load_embedding, save_embedding
    from sfumato.annotators import annotate, annotators
    from sfumato.controls import (
        CFG,
        PAG,
        SAG,
        SEGA,
        AttendAndExcite,
        Control,
        ControlNet,
        DeepCache,
        Depth,
        Edit,
        Inpaint,
        InstructPix2Pix,
        Pix2PixZero,
        TokenMerging,
    )
    from sfumato.errors import FileError, MismatchError, SfumatoError
    from sfumato.generate import Cancelled, generate
    from sfumato.images import Images, Picture
    from sfumato.invert import invert
    from sfumato.io.inspect import inspect
    from sfumato.io.load import blank, load, load_controlnet
    from sfumato.io.save import save
    from sfumato.model import Model
    from sfumato.prepare import prepare
    from sfumato.quantize import quantize
    from sfumato.schedule import Schedule
    from sfumato.types import Conditioning, Prediction, Residuals, Window

# fmt: off
_HOMES = {
    "adapters.lora": ("Lora",),
    "adapters.lora_file": ("load_lora",),
    "adapters.save_lora": ("save_lora",),
    "adapters.textual_inversion": ("Embedding", "load_embedding", "save_embedding"),
    "annotators": ("annotate", "annotators"),
    "controls": (
        "CFG", "PAG", "SAG", "SEGA", "AttendAndExcite", "Control", "ControlNet", "DeepCache", "Depth",
        "Edit", "Inpaint", "InstructPix2Pix", "Pix2PixZero", "TokenMerging",
    ),
    "errors": ("FileError", "MismatchError", "SfumatoError"),
    "generate": ("Cancelled", "generate"),
    "images": ("Images", "Picture"),
    "invert": ("invert",),
    "io.inspect": ("inspect",),
    "io.load": ("blank", "load", "load_controlnet"),
    "io.save": ("save",),
    "model": ("Model",),
    "prepare": ("prepare",),
    "quantize": ("quantize",),
    "schedule": ("Schedule",),
    "types": ("Conditioning", "Prediction", "Residuals", "Window"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CFG", "PAG", "SAG", "SEGA", "AttendAndExcite", "Cancelled", "Conditioning", "Control", "ControlNet",
    "DeepCache", "Depth", "Edit", "Embedding", "FileError", "Images", "Inpaint", "InstructPix2Pix", "Lora",
    "MismatchError", "Model", "Picture", "Pix2PixZero", "Prediction", "Residuals", "Schedule", "SfumatoError",
    "TokenMerging", "Window", "__version__", "annotate", "annotators", "blank", "generate", "inspect", "invert", "load",
    "load_controlnet", "load_embedding", "load_lora", "prepare", "quantize", "save", "save_embedding", "save_lora",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sfumato.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


class _Package(ModuleType):
    """A public name stays what it is, also where a module has the same one: importing that would set it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULE_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted(__all__)
