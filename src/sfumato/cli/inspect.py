"""`sfumato inspect`: what a file or folder is, or why it is broken."""

from __future__ import annotations

from typing import Annotated

import typer


def inspect(
    path: Annotated[str, typer.Argument(help="A checkpoint, ControlNet, LoRA, embedding: a file or a folder.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read all numbers, and look for NaN and infinity.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell what a file or folder is, or why it is broken (then the exit status is 1). Nothing in it is run."""
    from sfumato.io.inspect import inspect as look

    report = look(path, deep=deep)
    typer.echo(report.to_json() if json else str(report))
    raise typer.Exit(1 if report.problem else 0)
