"""`sfumato annotate` and `sfumato annotators`: control pictures, and what makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sfumato.errors import SfumatoError


def annotate(
    name: Annotated[str, typer.Argument(help="An annotator; `sfumato annotators` lists them.")],
    image: Annotated[Path, typer.Argument(help="The picture.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write: .png, .jpg or .webp.")],
    settings: Annotated[
        list[str] | None, typer.Option("-s", "--set", metavar="OPTION=VALUE", help="An option; may be repeated.")
    ] = None,
) -> None:
    """Make a control picture out of a picture: `sfumato annotate canny photo.png -o edges.png --set low=50`."""
    from sfumato.annotators import annotate as make
    from sfumato.image import format_of, write

    format_of(out)
    options = {}
    for setting in settings or ():
        key, sign, value = setting.partition("=")
        if not sign:
            raise SfumatoError(f"--set takes OPTION=VALUE, such as low=50, not {setting!r}.")
        options[key.strip()] = value.strip()
    write(make(name, image, **options), out)


def annotators(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the annotators with their options."""
    from json import dumps

    from sfumato.annotators import annotators as known

    if json:
        listed = {
            annotator.name: {
                "description": annotator.description,
                "options": {
                    option.name: {"kind": option.kind.__name__, "default": option.default, "takes": option.wanted()}
                    for option in annotator.options.values()
                },
            }
            for annotator in known().values()
        }
        typer.echo(dumps(listed, indent=2))
        return
    for annotator in known().values():
        typer.echo(f"{annotator.name:<12} {annotator.description}")
        for option in annotator.options.values():
            typer.echo(f"{'':<12} {option.name}={option.default}  {option.wanted()}")
