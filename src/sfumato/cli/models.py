"""`sfumato models`: what comes with the package."""

from __future__ import annotations

from typing import Annotated

import typer


def models(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List what comes with sfumato: names that go wherever a path or a hub id does."""
    from json import dumps

    from sfumato.embedded import PIECES

    if json:
        typer.echo(dumps([{
            "name": piece.name, "kind": piece.kind, "of": piece.of, "annotators": piece.annotators,
            "about": piece.about, "bytes": piece.size, "path": str(piece.path),
        } for piece in PIECES], indent=2))  # fmt: skip
        return
    width = max(len(piece.name) for piece in PIECES)
    for piece in PIECES:
        typer.echo(f"{piece.name:<{width}}  {piece.kind:<10}  {piece.size / 1e6:5.1f} MB  {piece.about}")
