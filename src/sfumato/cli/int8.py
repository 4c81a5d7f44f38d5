"""--int8."""

from __future__ import annotations

import typer

Int8Option = typer.Option(
    "--int8", help="Keep the kernels of the UNet, the text encoders and ControlNets as int8, to save memory."
)
