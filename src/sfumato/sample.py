"""THE loop: steer, evaluate, guide, step, project.

One body serves two drivers, `sample` (a scan, the fastest) and `sample_rows` (a few rows at a time, for progress,
preview and cancelling). Nothing random happens inside: noise is a column of the table. Sampler, prediction type and
the set of controls are the program; every number, prompt, picture, window and network is data and compiles nothing.
But for one thing: rows in which no control wants a branch of the network's batch go through a program without it.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, batched
from sfumato.division import divided
from sfumato.errors import SfumatoError
from sfumato.kept import Kept
from sfumato.models.attention import Taps
from sfumato.models.unet import UNet
from sfumato.samplers.base import Sampler
from sfumato.schedule import to_eps, to_output, to_x0
from sfumato.types import Conditioning, Prediction, Step

Carry = tuple[Latents, Any, tuple[Any, ...]]
"""Latents, what the sampler remembers, what each control carries."""


Asleep = frozenset[str]
"""The branches that no control wants."""
AWAKE: Asleep = frozenset()
SMALL = 100_000_000
"""Parameters of a network up to which a second program takes longer to be made ready than it saves: there a branch
sleeps through all rows or through none."""


def sample(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], x: Latents,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None = None,
) -> Latents:  # fmt: skip
    """Latents after all rows of `steps`, from `x` before the first active one, which is donated. `base` has "cond" and
    "uncond".

    `prediction` is what the network predicts (`sfumato.schedule.PREDICTIONS`). With a `mesh` the pictures are divided
    over its axis "batch", and every device works through the loop on its own.
    """
    parts = stretches(controls, base, steps, is_small(unet))
    if len(parts) == 1:
        return _whole(unet, sampler, steps, controls, x, base, prediction, mesh, parts[0][0])
    carry = start(unet, sampler, controls, base, prediction, steps, x)
    for asleep, active in parts:
        rows = dc.replace(steps, active=jnp.asarray(active))
        flat = _stretch(unet, sampler, rows, controls, carry, base, prediction, mesh, asleep)
        carry = jax.tree.unflatten(jax.tree.structure(carry), flat)
    return carry[0]


@functools.partial(Kept, top=True, static_argnames=("sampler", "prediction", "mesh", "asleep"), donate_argnames="x")
def _whole(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], x: Latents,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> Latents:  # fmt: skip
    """All rows, where the same branches are asleep in each."""

    def run(unet: UNet, steps: Step, controls: tuple[Control, ...], x: Latents, base: Any) -> Latents:
        begin = start(unet, sampler, controls, base, prediction, steps, x)
        return _scanned(unet, sampler, steps, controls, begin, base, prediction, asleep)[0]

    return divided(run, mesh, unet, steps, controls, x, base)


@functools.partial(Kept, top=True, static_argnames=("sampler", "prediction", "mesh", "asleep"))
def _stretch(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], carry: Carry,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> list[Array]:  # fmt: skip
    """The active rows of a part of the way; flat is what is carried on."""

    def run(unet: UNet, steps: Step, controls: tuple[Control, ...], carry: Carry, base: Any) -> Carry:
        return _scanned(unet, sampler, steps, controls, carry, base, prediction, asleep)

    return jax.tree.leaves(divided(run, mesh, unet, steps, controls, carry, base))


def _scanned(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], carry: Carry,
    base: Mapping[str, Conditioning], prediction: str, asleep: Asleep,
) -> Carry:  # fmt: skip
    body = functools.partial(row, unet, sampler, ready(controls), base, prediction, asleep)
    return jax.lax.scan(lambda carry, step: (body(carry, step), None), carry, steps)[0]


def is_small(unet: UNet) -> bool:
    """Whether a network is one of those of `SMALL`."""
    return sum(leaf.size for leaf in jax.tree.leaves(unet)) < SMALL


def stretches(
    controls: Sequence[Control], base: Mapping[str, Conditioning], steps: Step, once: bool = False
) -> list[tuple[Asleep, Bool[np.ndarray, " R"]]]:
    """The branches that are asleep and the rows that are active, for each stretch of rows that want the same ones; of
    those that sleep through all rows, in `once`."""
    columns = _on_host(steps)
    found: list[tuple[Asleep, Bool[np.ndarray, " R"]]] = []
    for index, asleep in _asleep(controls, base, columns, once):
        if not found or found[-1][0] != asleep:
            found.append((asleep, np.zeros_like(columns.active)))
        found[-1][1][index] = True
    return found or [(AWAKE, columns.active)]


def _asleep(
    controls: Sequence[Control], base: Mapping[str, Conditioning], columns: Step, once: bool
) -> Iterator[tuple[int, Asleep]]:  # fmt: skip
    """The numbers of the active rows, and the branches that no control wants in each, or `once` in all of them."""
    names = [name for name in all_branches(controls, base) if name != COND]
    wanted = {name: [np.asarray(control.wants(name, columns)) for control in controls] for name in names}
    for index in np.flatnonzero(columns.active):
        looked = columns.active if once else [index]
        yield int(index), frozenset(name for name in names if not any(rows[looked].any() for rows in wanted[name]))


def _on_host(steps: Step) -> Step:
    """The columns of a table, all but the noise, as numpy arrays."""
    return jax.tree.map(np.asarray, dc.replace(steps, noise=None))


def _cut(columns: Step, index: int) -> Step:
    """A row of a table."""
    return jax.tree.map(lambda column: column[index, ...], columns)


def sample_rows(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], x: Latents,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None = None,
) -> Iterator[Latents]:  # fmt: skip
    """As `sample`, one row at a time: yields the latents after each active row."""
    # Cut out here and not on the device, where each cut would be a program of its own.
    columns = jax.tree.map(np.asarray, steps)
    rows = list(_asleep(controls, base, columns, is_small(unet)))
    carry = start(unet, sampler, controls, base, prediction, steps, x)
    leaves, tree = jax.tree.flatten((unet, controls, base))  # once: of a network it takes milliseconds
    one_row, structure = _one_row.way(leaves, carry), jax.tree.structure(carry)
    for index, asleep in rows:
        step = _cut(columns, index)
        carry = jax.tree.unflatten(structure, one_row(leaves, tree, sampler, step, carry, prediction, mesh, asleep))
        yield carry[0]


@functools.partial(Kept, top=True, static_argnames=("tree", "sampler", "prediction", "mesh", "asleep"))
def _one_row(
    leaves: Sequence[Array], tree: Any, sampler: Sampler, step: Step, carry: Carry,
    prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> list[Array]:  # fmt: skip
    """A row; network, controls and conditionings come flat, and flat is what is carried on."""

    def run(unet: UNet, step: Step, controls: tuple[Control, ...], carry: Carry, base: Any) -> Carry:
        return row(unet, sampler, ready(controls), base, prediction, asleep, carry, step)

    unet, controls, base = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(divided(run, mesh, unet, step, controls, carry, base))


def start(
    unet: UNet, sampler: Sampler, controls: tuple[Control, ...], base: Mapping[str, Conditioning], prediction: str,
    steps: Step, x: Latents,
) -> Carry:  # fmt: skip
    """What the loop begins with."""
    memory = sampler.init(x)
    states = tuple(control.init(x, memory) for control in controls)
    if any(state is None for state in states):

        def first(steps: Step, carry: Carry) -> Carry:
            return _traced_row(unet, sampler, ready(controls), base, prediction, AWAKE, _cut(steps, 0), carry)

        shapes = jax.eval_shape(first, steps, (x, memory, states))[-1]
        states = tuple(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape) if state is None else state
            for state, shape in zip(states, shapes, strict=True)
        )
    return x, memory, states


def ready(controls: Sequence[Control]) -> tuple[Control, ...]:
    """The controls of a program before its rows."""
    return tuple(control.ready() for control in controls)


def row(
    unet: UNet, sampler: Sampler, controls: Sequence[Control], base: Mapping[str, Conditioning], prediction: str,
    asleep: Asleep, carry: Carry, step: Step,
) -> Carry:  # fmt: skip
    """One row of the table; a row that is not active changes nothing and costs nothing."""
    turn = functools.partial(active_row, unet, sampler, controls, base, prediction, asleep, step)
    return jax.lax.cond(step.active, turn, lambda carry: carry, carry)


def active_row(
    unet: UNet, sampler: Sampler, controls: Sequence[Control], base: Mapping[str, Conditioning], prediction: str,
    asleep: Asleep, step: Step, carry: Carry,
) -> Carry:  # fmt: skip
    """Steer, evaluate, guide, step, project."""
    x, memory, states = carry
    branches = {name: cond for name, cond in all_branches(controls, base).items() if name not in asleep}
    taps = frozenset().union(*(control.taps for control in controls))

    def evaluate(
        xs: Mapping[str, Latents], taps: Taps | Collection[str] = (), states: Sequence[Any] = ()
    ) -> dict[str, Prediction]:
        conds = {name: branches[name] for name in xs}
        for control, state in zip(controls, states, strict=False):  # none outside of the row's own evaluation
            conds = control.recall(conds, step, state)
        for control in controls:
            conds = control.condition(conds, xs, step)
        return batched(lambda x, cond: unet(x, step.t, cond, taps), xs, conds)

    def x0(out: Latents, x: Latents) -> Latents:
        return to_x0(out, x, step.alpha, step.sigma, prediction)

    def eps(out: Latents, x: Latents) -> Latents:
        return to_eps(out, x, step.alpha, step.sigma, prediction)

    def output(x0: Latents, eps: Latents) -> Latents:
        return to_output(x0, eps, step.alpha, step.sigma, prediction)

    def advance(x: Latents, out: Latents, memory: Any) -> tuple[Latents, Any]:
        return sampler.step(x, x0(out, x), eps(out, x), step, memory)

    def guided(preds: Mapping[str, Prediction], xs: Mapping[str, Latents]) -> Latents:
        return preds[COND].eps + sum(
            control.guide(env, preds, xs, step, ())[0] for control in controls if control.plain
        )

    env = Env(evaluate, guided, x0, eps, output, advance)
    xs, after = dict.fromkeys(branches, x), []
    for control, state in zip(controls, states, strict=True):
        xs, state = control.steer(env, xs, step, state)
        after.append(state)
    preds = evaluate(xs, taps, after)
    out = preds[COND].eps
    for i, control in enumerate(controls):
        difference, after[i] = control.guide(env, preds, xs, step, after[i])
        out = out + difference
    x, memory = advance(xs[UNCOND if UNCOND in xs else COND], out, memory)
    for i, control in enumerate(controls):
        x, after[i] = control.project(x, step, after[i])
    return x, memory, tuple(after)


_traced_row = jax.jit(active_row, static_argnames=("sampler", "prediction", "asleep"))
"""For its shapes alone, which jax remembers."""


def all_branches(controls: Sequence[Control], base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
    """Every row of the network's batch, by name: "cond", and what the controls ask for.

    Two controls may share a branch of `base`. Raises SfumatoError for two different branches of one name.
    """
    branches, owners = {COND: base[COND]}, {}
    for control in controls:
        for name, cond in control.branches(base).items():
            if name in owners and branches[name] is not cond:
                raise SfumatoError(f"{type(control).__name__} and {owners[name]} both have a branch {name!r}.")
            branches[name] = cond
            owners.setdefault(name, type(control).__name__)
    return branches


def check_together(controls: Sequence[Control], prepared: Sequence[Control]) -> None:
    """Raises SfumatoError, with both names, for two controls that make no sense beside each other.

    `controls` are those that the user gave, and `prepared` what became of each.
    """
    names = [type(control).__name__ for control in controls]
    for i, (control, name) in enumerate(zip(controls, names, strict=True)):
        for other in control.excludes.keys() & {*names[:i], *names[i + 1 :]}:
            raise SfumatoError(f"{name} and {other} cannot run together: {control.excludes[other]}.")
    setters = [name for control, name in zip(prepared, names, strict=True) if control.sets_channels]
    if len(setters) > 1:
        raise SfumatoError(f"{setters[0]} and {setters[1]} both set the extra input channels of the network.")


def initial(
    steps: Step, noise: Float[Array, "B h w C"], image: Float[Array, "B h w C"] | None, start_sigma: float, first: int
) -> Latents:
    """Where a run starts: noise, or `image` (clean latents) with the noise of row `first`."""
    if image is None:
        return noise if start_sigma == 1 else noise * start_sigma
    return steps.alpha[first] * image + steps.sigma[first] * noise
