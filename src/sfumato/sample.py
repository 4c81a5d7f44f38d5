"""THE loop: steer, evaluate, guide, step, project.

One body serves two drivers, `sample` (a scan, the fastest) and `sample_rows` (a few rows at a time, for progress,
preview and cancelling). Nothing random happens inside: noise is a column of the table. Sampler, prediction type and
the set of controls are the program; every number, prompt, picture, window and network is data and compiles nothing.
But for one thing: rows in which no control wants a branch of the network's batch go through a program without it.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from sfumato.branches import AWAKE, Asleep, all_branches, asleep_rows, is_small, stretches
from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, batched
from sfumato.division import divided
from sfumato.errors import SfumatoError
from sfumato.kept import Kept
from sfumato.models.attention import Asked
from sfumato.models.unet import UNet
from sfumato.samplers.base import Sampler
from sfumato.schedule import to_eps, to_output, to_x0
from sfumato.types import Conditioning, Prediction, Step

Carry = tuple[Latents, Any, tuple[Any, ...]]
"""Latents, what the sampler remembers, what each control carries."""

Branches = Mapping[str, Conditioning]
"""The rows of the network's batch, by name: `all_branches`."""


def sample(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], x: Latents,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None = None,
) -> Latents:  # fmt: skip
    """Latents after all rows of `steps`, from `x` before the first active one, which is donated. `base` has "cond" and
    "uncond".

    `prediction` is what the network predicts (`sfumato.schedule.PREDICTIONS`). With a `mesh` the pictures are divided
    over its axis "batch", and every device works through the loop on its own.
    """
    parts = stretches(controls, base, steps)
    if len(parts) == 1:
        return _whole(unet, sampler, steps, controls, x, base, prediction, mesh, parts[0][0])
    controls, branches = begin(unet, controls, base, _changes)
    carry = start(unet, sampler, controls, branches, prediction, steps, x)
    rows = [(dc.replace(steps, active=active), asleep) for asleep, active in parts]
    *_, carry = _carried(_stretch, unet, sampler, controls, branches, prediction, mesh, rows, carry)
    return carry[0]


@functools.partial(Kept, top=True, static_argnames=("sampler", "prediction", "mesh", "asleep"), donate_argnames="x")
def _whole(
    unet: UNet, sampler: Sampler, steps: Step, controls: tuple[Control, ...], x: Latents,
    base: Mapping[str, Conditioning], prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> Latents:  # fmt: skip
    """All rows, where the same branches are asleep in each."""

    def run(unet: UNet, steps: Step, controls: tuple[Control, ...], x: Latents, base: Any) -> Latents:
        given = begin(unet, controls, base, _changes.function)
        carry = start(unet, sampler, *given, prediction, steps, x)
        return _scanned(unet, sampler, *given, prediction, asleep, carry, steps)[0]

    return divided(run, mesh, unet, steps, controls, x, base)


def _carried(
    program: Kept, unet: UNet, sampler: Sampler, controls: tuple[Control, ...], branches: Branches, prediction: str,
    mesh: Mesh | None, parts: Sequence[tuple[Step, Asleep]], carry: Carry,
) -> Iterator[Carry]:  # fmt: skip
    """What `program`, `_stretch` or `_one_row`, carries on from each part of the way, with what is asleep there.

    Where something else is asleep it is another program, which is made ready while the first one works.
    """
    leaves, tree = jax.tree.flatten((unet, controls, branches))  # once: of a network it takes milliseconds
    way, structure = program.way(leaves, carry), jax.tree.structure(carry)

    def given(steps: Step, asleep: Asleep, carry: Carry) -> tuple[Any, ...]:
        return leaves, tree, sampler, steps, carry, prediction, mesh, asleep

    kinds = {asleep: steps for steps, asleep in parts}
    ready: dict[Asleep, Callable[[], None]] = {}
    if len(kinds) > 1 and mesh is None:
        ready = {asleep: program.prepare(*given(steps, asleep, carry)) for asleep, steps in kinds.items()}
    for steps, asleep in parts:
        if asleep in ready:
            ready[asleep]()
        carry = jax.tree.unflatten(structure, way(*given(steps, asleep, carry)))
        yield carry


@functools.partial(Kept, top=True, static_argnames=("tree", "sampler", "prediction", "mesh", "asleep"))
def _stretch(
    leaves: Sequence[Array], tree: Any, sampler: Sampler, steps: Step, carry: Carry,
    prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> list[Array]:  # fmt: skip
    """The active rows of a table; network, controls and branches come flat, and flat is what is carried on."""
    return _moved_on(_scanned, leaves, tree, sampler, steps, carry, prediction, mesh, asleep)


@functools.partial(Kept, top=True, static_argnames=("tree", "sampler", "prediction", "mesh", "asleep"))
def _one_row(
    leaves: Sequence[Array], tree: Any, sampler: Sampler, step: Step, carry: Carry,
    prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> list[Array]:  # fmt: skip
    """The same of one row."""
    return _moved_on(row, leaves, tree, sampler, step, carry, prediction, mesh, asleep)


def _moved_on(
    body: Callable[..., Carry], leaves: Sequence[Array], tree: Any, sampler: Sampler, steps: Step, carry: Carry,
    prediction: str, mesh: Mesh | None, asleep: Asleep,
) -> list[Array]:  # fmt: skip
    def run(unet: UNet, steps: Step, controls: tuple[Control, ...], carry: Carry, branches: Branches) -> Carry:
        return body(unet, sampler, controls, branches, prediction, asleep, carry, steps)

    unet, controls, branches = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(divided(run, mesh, unet, steps, controls, carry, branches))


def _scanned(
    unet: UNet, sampler: Sampler, controls: tuple[Control, ...], branches: Branches, prediction: str, asleep: Asleep,
    carry: Carry, steps: Step,
) -> Carry:  # fmt: skip
    body = functools.partial(row, unet, sampler, controls, branches, prediction, asleep)
    return jax.lax.scan(lambda carry, step: (body(carry, step), None), carry, steps)[0]


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
    found = asleep_rows(controls, base, columns, once=is_small(unet))
    rows = [(_cut(columns, index), asleep) for index, asleep in found]
    controls, branches = begin(unet, controls, base, _changes)
    carry = start(unet, sampler, controls, branches, prediction, steps, x)
    for after in _carried(_one_row, unet, sampler, controls, branches, prediction, mesh, rows, carry):
        yield after[0]


def begin(
    unet: UNet, controls: tuple[Control, ...], base: Mapping[str, Conditioning], changes: Callable[..., Any]
) -> tuple[tuple[Control, ...], Branches]:  # fmt: skip
    """The controls, ready, and the branches with what the network makes of their texts: what no row changes.

    `changes` is `_changes`, or its function for who is in a program already.
    """
    fields, heard = changes(unet, controls, base)
    made = tuple(dc.replace(cast(Any, control), **new) for control, new in zip(controls, fields, strict=True))
    found = all_branches(controls, base).items()
    return made, {name: dc.replace(cond, heard=heard[name]) for name, cond in found}


@functools.partial(Kept, top=True)
def _changes(unet: UNet, controls: tuple[Control, ...], base: Mapping[str, Conditioning]) -> tuple[list[Any], Any]:
    """The fields of each control that are others when it is ready, and what is heard, by branch. Raises SfumatoError
    for fields that a control does not have."""
    conds = all_branches(controls, base)
    made = [control.ready(conds) for control in controls]
    for control, new in zip(controls, made, strict=True):
        for name in new.keys() - {field.name for field in dc.fields(cast(Any, control))}:
            raise SfumatoError(f"{type(control).__name__}.ready gives a field {name!r}, which it does not have.")
    return made, {name: unet.hear(cond.context) for name, cond in conds.items()}


def start(
    unet: UNet, sampler: Sampler, controls: tuple[Control, ...], branches: Branches, prediction: str, steps: Step,
    x: Latents,
) -> Carry:  # fmt: skip
    """What the loop begins with."""
    memory = sampler.init(x)
    states = tuple(control.init(x, memory) for control in controls)
    if any(state is None for state in states):

        def first(steps: Step, carry: Carry) -> Carry:
            return _traced_row(unet, sampler, controls, branches, prediction, AWAKE, _cut(steps, 0), carry)

        shapes = jax.eval_shape(first, steps, (x, memory, states))[-1]
        states = tuple(
            jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape) if state is None else state
            for state, shape in zip(states, shapes, strict=True)
        )
    return x, memory, states


def row(
    unet: UNet, sampler: Sampler, controls: Sequence[Control], branches: Branches, prediction: str, asleep: Asleep,
    carry: Carry, step: Step,
) -> Carry:  # fmt: skip
    """One row of the table; a row that is not active changes nothing and costs nothing."""
    turn = functools.partial(active_row, unet, sampler, controls, branches, prediction, asleep, step)
    return jax.lax.cond(step.active, turn, lambda carry: carry, carry)


def active_row(
    unet: UNet, sampler: Sampler, controls: Sequence[Control], branches: Branches, prediction: str, asleep: Asleep,
    step: Step, carry: Carry,
) -> Carry:  # fmt: skip
    """Steer, evaluate, guide, step, project."""
    x, memory, states = carry
    branches = {name: cond for name, cond in branches.items() if name not in asleep}
    taps = frozenset().union(*(control.taps for control in controls))

    def evaluate(
        xs: Mapping[str, Latents], taps: Asked | Collection[str] = (), states: Sequence[Any] = ()
    ) -> dict[str, Prediction]:
        conds = {name: branches[name] for name in xs}
        for control, state in zip(controls, states, strict=False):  # none outside of the row's own evaluation
            conds = _known(control.recall(conds, step, state), branches)
        for control in controls:
            conds = _known(control.condition(conds, xs, step), branches)
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


def _known(conds: dict[str, Conditioning], branches: Branches) -> dict[str, Conditioning]:
    """What a control has made of the branches, without what is heard if there are other words now."""
    if all(cond.context is branches[name].context for name, cond in conds.items()):
        return conds
    return {name: dc.replace(cond, heard=None) for name, cond in conds.items()}


_traced_row = jax.jit(active_row, static_argnames=("sampler", "prediction", "asleep"))
"""For its shapes alone, which jax remembers."""


def initial(
    steps: Step, noise: Float[Array, "B h w C"], image: Float[Array, "B h w C"] | None, start_sigma: float, first: int
) -> Latents:
    """Where a run starts: noise, or `image` (clean latents) with the noise of row `first`."""
    if image is None:
        return noise if start_sigma == 1 else noise * start_sigma
    return steps.alpha[first] * image + steps.sigma[first] * noise
