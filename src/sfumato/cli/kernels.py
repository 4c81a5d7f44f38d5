"""--int8 and --prepare."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import typer

from sfumato.errors import SfumatoError

if TYPE_CHECKING:
    from sfumato.model import Model
    from sfumato.models.controlnet import ControlNet

    K = TypeVar("K", Model, ControlNet)

Int8Option = typer.Option(
    "--int8", help="Keep the kernels of the UNet, the text encoders and ControlNets as int8, to save memory."
)
PrepareOption = typer.Option(
    "--prepare", help="Bring the large kernels of the UNet and of ControlNets into the form in which processors "
    "multiply them, to save time for more memory.",
)  # fmt: skip


def check_kernels(int8: bool, prepare: bool) -> None:
    """Raises SfumatoError for both."""
    if int8 and prepare:
        raise SfumatoError("--int8 saves memory and --prepare spends it; give one of them.")


def as_wished(network: K, int8: bool, prepare: bool) -> K:
    """The model or ControlNet with its kernels as the options say."""
    import sfumato

    return sfumato.quantize(network) if int8 else sfumato.prepare(network) if prepare else network
