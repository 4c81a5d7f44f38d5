"""sfumato: controlled image generation with latent diffusion, in JAX.

The public names, each loaded when it is first used, so that importing sfumato takes next to no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfumato.version import __version__

if TYPE_CHECKING:
    from sfumato.errors import FileError, MismatchError, SfumatoError
    from sfumato.io.inspect import inspect
    from sfumato.io.load import load, load_controlnet
    from sfumato.io.save import save
    from sfumato.model import Model
    from sfumato.schedule import Schedule
    from sfumato.types import Conditioning, Prediction, Residuals

_HOMES = {
    "FileError": "errors", "MismatchError": "errors", "SfumatoError": "errors",
    "inspect": "io.inspect", "load": "io.load", "load_controlnet": "io.load", "save": "io.save",
    "Model": "model", "Schedule": "schedule",
    "Conditioning": "types", "Prediction": "types", "Residuals": "types",
}  # fmt: skip

__all__ = [
    "Conditioning", "FileError", "MismatchError", "Model", "Prediction", "Residuals", "Schedule", "SfumatoError",
    "__version__", "inspect", "load", "load_controlnet", "save",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"sfumato.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
