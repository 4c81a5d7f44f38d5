"""The command line: one file a sub-command."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import warnings
from typing import Any

import typer

from sfumato.cli.annotate import annotate, annotators
from sfumato.cli.bench import bench
from sfumato.cli.generate import generate
from sfumato.cli.inspect import inspect
from sfumato.cli.models import models
from sfumato.cli.samplers import samplers
from sfumato.cli.status import INTERRUPTED
from sfumato.cli.train import app as train
from sfumato.errors import SfumatoError
from sfumato.version import __version__

app = typer.Typer(
    name="sfumato", help="Controlled image generation with latent diffusion, in JAX.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip
for command in (generate, inspect, models, annotate, annotators, samplers, bench):
    app.command()(command)
app.add_typer(train, name="train")


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"sfumato {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def process() -> None:
    """`main` in a process of its own, which then goes at once: taking apart what jax and the compiler have built up in
    memory would take another third of a second."""
    status = 1

    def leave() -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)  # before all others, which makes it the last of them
    if sys.argv[1:2] == ["train"]:
        from sfumato.train import pages  # imports jax

        pages.prepare()
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
        raise
    except KeyboardInterrupt:
        status = INTERRUPTED
        raise


def main() -> None:
    """Runs the command line: a user's mistake is one sentence on standard error and exit status 2."""
    warnings.showwarning = _show_warning
    # Imports and tracing make millions of objects that stay: looking through them again and again costs a picture of
    # the embedded model a tenth of its time.
    gc.set_threshold(100_000, 20, 20)
    try:
        status = app(prog_name="sfumato", standalone_mode=False)
    except SfumatoError as error:
        typer.echo(f"sfumato: {error}", err=True)
        sys.exit(2)
    except BrokenPipeError:
        # Whoever read the output has seen enough (`| head`); the interpreter must not complain when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        _show_usage(error)
        sys.exit(2)
    sys.exit(status if isinstance(status, int) else 0)


def _show_usage(error: Any) -> None:
    """Says in a sentence what of the words does not fit; anything else is raised on. Their class is typer's own or
    click's, depending on the version."""
    if not hasattr(error, "format_message"):
        raise error
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    path = getattr(getattr(error, "ctx", None), "command_path", "sfumato")
    typer.echo(f"sfumato: {error.format_message().rstrip('.')}; `{path} -h` says what it takes.", err=True)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    typer.echo(f"sfumato: {message}", err=True)
