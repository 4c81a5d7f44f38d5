"""Which sizes of blocks and which thresholds of the kernels are the fastest on this machine."""

from __future__ import annotations

import dataclasses as dc
import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sfumato.bench import timed
from sfumato.errors import SfumatoError
from sfumato.image import write_atomically
from sfumato.models import kernels
from sfumato.models.attention import FeedForward
from sfumato.models.kernels.convolution import LAST, SAME
from sfumato.models.kernels.table import VALUES, Table, place, using, usual, written

MARGIN = 0.03
"""The share of its time that another value must save: below it, the package's stays."""

LAYERS = 4
"""Convolutions one after the other, each with a kernel of its own: in a network, too, a kernel is no longer in the
cache when its layer comes round again."""

Work = Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
"""Makes a function that has to do with a number, and its arguments."""

Program = Callable[[], Any]
Clock = Callable[[Program], tuple[Any, float]]


@dc.dataclass(frozen=True)
class Item:
    """One number of the table, and what it is measured by."""

    number: str
    name: str
    works: tuple[Work, ...]


@dc.dataclass(frozen=True)
class Choice:
    """What came of an item."""

    number: str
    name: str
    before: int
    after: int
    ratio: float
    """Time with `after` by that with `before`."""


def tune(
    items: Sequence[Item] | None = None, *, runs: int = 5, clock: Clock = timed,
    watch: Callable[[str], None] = lambda line: None,
) -> tuple[list[Choice], Path]:  # fmt: skip
    """Chooses every number of the kernels' table by measurement and keeps them for later processes: the file's path.

    Each is chosen with the others as chosen before, and as they come with the package. `runs` is how often each program
    is run; `watch` gets a line for every item. Raises SfumatoError where nothing is kept between processes, where the
    file cannot be written, and on other devices than processors, which have kernels of their own.
    """
    path = place()
    if path is None:
        raise SfumatoError("There is no place to keep what is measured: SFUMATO_CACHE is off; it may name a folder.")
    if runs < 1:
        raise SfumatoError(f"runs must be a whole number from 1 on, not {runs}.")
    if jax.default_backend() != "cpu":
        raise SfumatoError(
            f"What is tuned are kernels for processors, and jax computes on a {jax.default_backend()} here; "
            "JAX_PLATFORMS=cpu chooses the processor."
        )
    table, choices = usual(), []
    items = ITEMS if items is None else items
    for done, item in enumerate(items, 1):
        watch(f"{done} of {len(items)}: {item.name}")
        choices.append(choose(item, table, runs, clock))
        table = dc.replace(table, **{item.number: choices[-1].after})
    return choices, write_atomically(path, lambda file: file.write(written(table).encode()))


def choose(item: Item, table: Table, runs: int, clock: Clock) -> Choice:
    """The value with which the works of an item take the least time in all.

    The best of many is partly luck. So it is measured against the value of `table` once more, alone, and must win by
    `MARGIN` both times.
    """
    before = getattr(table, item.number)
    programs = _programs(item, table)

    def seconds(*values: int) -> dict[int, float]:
        each = _medians((program for value in values for program in programs[value]), runs, clock)
        return {value: sum(each[program] for program in programs[value]) for value in values}

    found = seconds(before, *(value for value in programs if value != before))
    best, ratio = min(found, key=found.__getitem__), 1.0
    if found[best] <= (1 - MARGIN) * found[before]:
        found = seconds(before, best)
        ratio = found[best] / found[before]
    kept = ratio <= 1 - MARGIN
    return Choice(item.number, item.name, before, best if kept else before, ratio if kept else 1.0)


def _programs(item: Item, table: Table) -> dict[int, list[Program]]:
    """By value: its works, compiled. Values that lead to one program share it, so that no noise tells them apart."""
    found: dict[int, list[Program]] = {value: [] for value in VALUES[item.number]}
    for make in item.works:
        function, arrays = make()
        made: dict[str, Program] = {}
        for value, programs in found.items():
            with using(dc.replace(table, **{item.number: value})):
                lowered = jax.jit(function).lower(*arrays)
            text = lowered.as_text()
            if text not in made:
                made[text] = functools.partial(lowered.compile(), *arrays)
            programs.append(made[text])
    return found


def _medians(programs: Iterable[Program], runs: int, clock: Clock) -> dict[Program, float]:
    """The seconds of each, all taking turns; the first round does not count."""
    times: dict[Program, list[float]] = {program: [] for program in programs}
    for _ in range(runs + 1):
        for program, each in times.items():
            each.append(clock(program)[1])
    return {program: statistics.median(each[1:]) for program, each in times.items()}


def attention(places: int, heads: int, width: int, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Self-attention of two pictures."""
    return kernels.attention, tuple(_random((2, places, heads, width), dtype, seed) for seed in range(3))


def feed_forward(places: int, width: int, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The gated layer of a transformer block, for two pictures."""
    layer = FeedForward(width, rngs=nnx.Rngs(0))
    shape, state = nnx.split(layer)
    state = jax.tree.map(lambda leaf: leaf.astype(dtype), state)

    def call(state: Any, x: Any) -> Any:
        return kernels.in_blocks(nnx.merge(shape, state), x)

    return call, (state, _random((2, places, width), dtype))


def convolutions(batch: int, side: int, channels: int, dtype: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """`LAYERS` convolutions of square pictures that keep their shape."""
    scale = (9 * channels) ** -0.5  # so that numbers stay as large as they are
    layers = [_random((3, 3, channels, channels), dtype, seed, scale) for seed in range(LAYERS)]

    def call(x: Any, layers: Sequence[Any]) -> Any:
        for kernel in layers:
            x = kernels.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=LAST)
        return x

    return call, (_random((batch, side, side, channels), dtype), layers)


def _random(shape: tuple[int, ...], dtype: str, seed: int = 0, scale: float = 1.0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32) * scale, dtype)


def _works(make: Callable[..., Any], sizes: Sequence[tuple[int, ...]], *dtypes: str) -> tuple[Work, ...]:
    return tuple(functools.partial(make, *size, dtype) for dtype in dtypes for size in sizes)


# Sizes of Stable Diffusion 1.5 at 512 x 512, both rows of its guidance at once, or one; many places and few channels
# are those of autoencoders.
BOTH = ("float32", "bfloat16")
LEVELS = ((2, 64, 320), (2, 32, 640), (2, 16, 1280))
FEW = ((2, 8, 1280), (1, 16, 1280), (2, 16, 1280))
MANY = (1, 128, 256)
NARROW = ((1, 128, 64), (1, 128, 96), (1, 128, 128))

ITEMS = (
    Item("bfloat16_wide", "bfloat16 multiplied as float32",
         (*_works(feed_forward, ((4096, 320), (1024, 640)), "bfloat16"), *_works(convolutions, LEVELS, "bfloat16"))),
    Item("query_block", "queries of attention at once",
         _works(attention, ((4096, 8, 40), (1024, 8, 80)), *BOTH)),
    Item("rows", "places of a feed-forward layer at once",
         _works(feed_forward, ((4096, 320), (1024, 640)), *BOTH)),
    Item("float32_f4", "Winograd F(4x4), float32, from places", _works(convolutions, LEVELS, "float32")),
    Item("f4_block", "Winograd F(4x4), values at once", _works(convolutions, (*LEVELS, MANY), "float32")),
    Item("float32_f2", "Winograd F(2x2), float32, from places", _works(convolutions, FEW, "float32")),
    Item("bfloat16_f2", "Winograd F(2x2), bfloat16, from places", _works(convolutions, LEVELS, "bfloat16")),
    Item("f2_block", "Winograd F(2x2), values at once", _works(convolutions, LEVELS, "bfloat16")),
    Item("bfloat16_f2_few", "the same in large blocks, from places", _works(convolutions, LEVELS, "bfloat16")),
    Item("channels", "these forms of convolution, from channels", _works(convolutions, NARROW, *BOTH)),
)  # fmt: skip
"""Every number of the table, in the order in which they are chosen."""
