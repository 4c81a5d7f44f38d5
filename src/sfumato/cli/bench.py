"""`sfumato bench`: how fast a model draws on this machine, and which numbers make its kernels faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfumato.cli.kernels import Int8Option, PrepareOption, check_kernels
from sfumato.cli.size import parsed_size
from sfumato.embedded import DEFAULT
from sfumato.errors import SfumatoError

if TYPE_CHECKING:
    from sfumato.bench import Figures
    from sfumato.tune import Choice


def bench(
    model: Annotated[str, typer.Option("-m", "--model", help="A folder, a single-file checkpoint, a hub id, or one of "
                                       "`sfumato models`.")] = DEFAULT,
    steps: Annotated[int | None, typer.Option(help="Evaluations of the network; 30, or what the model says.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Such as 768x512; the model's own.")] = None,
    count: Annotated[int, typer.Option("-n", "--count", help="How many pictures at once.")] = 1,
    runs: Annotated[int, typer.Option(help="How many times.")] = 5,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    int8: Annotated[bool, Int8Option] = False,
    prepare: Annotated[bool, PrepareOption] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Instead of a model, measure the kernels with other sizes of "
                                       "blocks, which takes minutes, and keep the fastest for later runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
    """Measure how long a model takes on this machine; compare only what was measured on one. Or tune the kernels."""
    from json import dumps

    if tune:
        from sfumato.tune import tune as measured

        if (model, steps, size, count, dtype, int8, prepare) != (DEFAULT, None, None, 1, None, False, False):
            raise SfumatoError("--tune measures no model: of the other options it takes --runs and --json alone.")
        choices, path = measured(runs=runs, watch=lambda line: typer.echo(line, err=True))
        typer.echo(dumps([vars(choice) for choice in choices], indent=2) if json else chosen(choices, path))
        return
    from sfumato.bench import bench as measure

    check_kernels(int8, prepare)
    figures = measure(
        model, steps=steps, size=parsed_size(size), count=count, runs=runs, dtype=dtype, int8=int8, prepare=prepare
    )
    typer.echo(dumps(figures.record(), indent=2) if json else table(figures))


def chosen(choices: Sequence[Choice], path: Path) -> str:
    """What was tuned, for people."""
    from sfumato.models.kernels.table import NEVER

    def said(number: int) -> str:
        return "never" if number == NEVER else str(number)

    width = max(len(choice.name) for choice in choices)
    lines = [f"{'':{width}}{'before':>10}{'after':>10}{'ratio':>8}"]
    for each in choices:
        lines.append(f"{each.name:{width}}{said(each.before):>10}{said(each.after):>10}{each.ratio:8.2f}")
    return "\n".join([*lines, "", f"Kept in {path}, which later runs read; to go back, delete it."])


def table(figures: Figures) -> str:
    """The figures for people."""
    machine, program = figures.machine, figures.program
    pictures = f"{program['pictures']} picture{'s' * (program['pictures'] != 1)}"
    weights = ", int8 weights" * program["int8"] + ", prepared" * program["prepare"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores; {', '.join(machine['devices'])}",
        f"sfumato {machine['sfumato']}, jax {machine['jax']}, Python {machine['python']}",
        f"{program['model']} ({program['family']}), {program['dtype']}{weights}, {pictures} of "
        f"{program['size'][0]}x{program['size'][1]}, {program['steps']} steps, guidance {program['guidance']:g}",
        _kernels(program["tuned"]),
        "",
        f"{'load':24}{figures.load:8.3f} s",
        f"{'first run, compiling':24}{figures.first:8.3f} s",
    ]
    for name, times in (("run", figures.whole), ("without autoencoder", figures.sampled), ("decode", figures.decoded)):
        lines.append(f"{name:24}{times.median:8.3f} s  ({min(times.each):.3f} to {max(times.each):.3f})")
    lines.append(f"{'step':24}{figures.sampled.median / program['steps']:8.3f} s")
    lines.append(f"{'pictures a second':24}{program['pictures'] / figures.whole.median:8.3f}")
    lines += [f"{f'memory, {name}':24}{size / 2**30:8.2f} GiB" for name, size in figures.memory.items()]
    return "\n".join(lines)


def _kernels(tuned: Mapping[str, int] | None) -> str:
    """Whether the kernels are tuned, and what that changed."""
    if tuned is None:
        return "kernels not tuned (`sfumato bench --tune`)"
    return "kernels tuned: " + (", ".join(f"{name} {number}" for name, number in tuned.items()) or "nothing to change")
