"""`sfumato samplers`: the names that --sampler takes."""

from __future__ import annotations

from typing import Annotated

import typer


def samplers(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the samplers."""
    from json import dumps

    from sfumato.samplers import SAMPLERS

    listed = {name: _description(make) for name, make in SAMPLERS.items()}
    if json:
        typer.echo(dumps(listed, indent=2))
        return
    width = max(map(len, listed))
    for name, description in listed.items():
        typer.echo(f"{name:<{width}}  {description}")


def _description(make: object) -> str:
    """What a sampler is, and where it takes its noise levels from. Its file is about it alone and says so in its
    first line; the documentation of its class goes straight to the formula."""
    import functools
    import sys

    partial = make if isinstance(make, functools.partial) else functools.partial(make)  # pyright: ignore[reportArgumentType, reportCallIssue]
    line = (sys.modules[partial.func.__module__].__doc__ or "").split("\n")[0]
    kind = partial.keywords.get("sigmas")
    return f"{line.removesuffix('.')}; noise levels: {kind}." if kind else line
