"""`sfumato train`: a sub-command for each recipe, made of its settings."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from sfumato.cli.status import INTERRUPTED
from sfumato.errors import SfumatoError
from sfumato.train.fields import NEEDED, Options, Size
from sfumato.train.groups import PANELS
from sfumato.train.own import RECIPES, Recipe
from sfumato.train.settings import Flag, Settings, assembled, flags, read_config

CONFIG = "--config"
EXTRA = ("optax", "orbax", "grain", "datasets", "tensorboardX")
"""What training needs besides."""


class Configured(TyperGroup):
    """`train --config FILE ...` is the command of the recipe in that file."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-"):
            path = next((after for word, after in itertools.pairwise(args) if word == CONFIG), None)
            path = path or next((word.partition("=")[2] for word in args if word.startswith(f"{CONFIG}=")), None)
            if path is not None:
                args = [Settings.read(path).recipe.name, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Configured, no_args_is_help=True, help="Train a model, or a part of it: `sfumato train RECIPE --help`; "
    "`sfumato train --config FILE` repeats a run.",
)  # fmt: skip


def command(recipe: type[Recipe]) -> Callable[..., None]:
    """The command of a recipe: its signature is made of its flags."""
    known = {flag.key: flag for flag in flags(recipe)}

    def train(ctx: Any, config: Path | None, **given: Any) -> None:
        said = [key for key in given if ctx.get_parameter_source(key).name == "COMMANDLINE"]
        values = {key: known[key].kind.parse(given[key], known[key].name) for key in said}
        _run(_settings(recipe, config, values))

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    config = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, annotation=Path,
        default=typer.Option(None, CONFIG, help="The configuration of a run, config.json in its folder; other flags "
                             "override what is in it."),
    )  # fmt: skip
    parameters = [_parameter(flag) for flag in known.values()]
    train.__signature__ = inspect.Signature([context, config, *parameters])  # type: ignore[attr-defined]
    train.__annotations__ = {each.name: each.annotation for each in (context, config, *parameters)}
    train.__doc__ = recipe.summary
    return train


def _parameter(flag: Flag) -> inspect.Parameter:
    """A parameter that typer makes the flag of."""
    kind, known = flag.kind, flag.field.metadata
    metavar = known["metavar"] or "|".join(kind.choices) or ("NAME=VALUE" if kind.type == Options else None)
    needed = flag.default is NEEDED
    default = None if needed or kind.type in (Size, Options) else flag.default
    option = typer.Option(
        list(default) if isinstance(default, tuple) else default, *flag.names, metavar=metavar,
        help=known["help"] + (" Needed." if needed else ""), rich_help_panel=PANELS[flag.group],
        show_default=default is not False and default not in (None, (), ""),
    )  # fmt: skip
    annotation: Any = list[str] if kind.repeated else str if kind.type == Size else kind.type
    return inspect.Parameter(flag.key, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=annotation)


def _settings(recipe: type[Recipe], config: Path | None, given: dict[str, Any]) -> Settings:
    """Those of the file with the flags over them, or of the flags alone."""
    if config is None:
        return assembled(recipe, given)
    settings = Settings.from_json(read_config(config), str(config))
    if type(settings.recipe) is not recipe:
        raise SfumatoError(f"{config} is of the recipe {settings.recipe.name}, and this is {recipe.name}.")
    return settings.with_flags(given)


def _run(settings: Settings) -> None:
    try:
        from sfumato.train.job import run

        outcome = run(settings)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise SfumatoError(f"Training needs {error.name}: pip install 'sfumato[train]'.") from None
    except KeyboardInterrupt:
        typer.echo("sfumato: Interrupted; the same command goes on from the last checkpoint.", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if outcome.stopped:
        raise typer.Exit(INTERRUPTED)
    if not settings.run.quiet and not settings.parallel.process:
        typer.echo(str(outcome.final))


for _recipe in RECIPES.values():
    app.command(_recipe.name)(command(_recipe))
