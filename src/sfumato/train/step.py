"""One step of training."""

from __future__ import annotations

import dataclasses as dc
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from sfumato import compiler
from sfumato.models.kernels import inside_loop, patiently
from sfumato.train import pages
from sfumato.types import pytree

Loss = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, Mapping[str, jax.Array]]]
"""(trainable, frozen, batch, key) -> (float32 mean over the rows of the batch, metrics that are such means too). One
that changes in the course of training has a further parameter `step`, and is told how many steps are done."""

STOP = "stop"
"""The metric that tells all processes whether one of them has been asked to stop."""


@pytree
class State:
    """All that a step changes, and all that a checkpoint holds besides the state of the data."""

    step: Any
    """Steps done, int32."""
    trainable: Any
    """The weights, float32."""
    optimizer: Any
    """optax's state: for trainable weights only."""
    ema: Any = None
    """The moving average of the weights, if there is one."""


@dc.dataclass(frozen=True)
class Step:
    """One step of training, as a pure function."""

    loss: Loss
    optimizer: optax.GradientTransformationExtraArgs
    accumulate: int
    clip: float | None
    ema: float | None
    rates: Mapping[str, optax.Schedule] = dc.field(default_factory=dict)
    """Schedules by the metric that tells their value."""

    def begin(self, trainable: Any) -> State:
        """The state before the first step. It shares no memory with `trainable`: steps overwrite it."""
        copy = functools.partial(jax.tree.map, jnp.copy)
        average = None if self.ema is None else copy(trainable)
        return State(jnp.zeros((), jnp.int32), copy(trainable), self.optimizer.init(trainable), average)

    def __call__(
        self, state: State, frozen: Any, batch: Any, stop: jax.Array, seed: jax.Array
    ) -> tuple[State, dict[str, jax.Array]]:
        """The state after a batch [parts, B / parts, ...], and the metrics. `stop` [1, devices]: who wants to stop."""
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (value, metrics), gradients = self._gradients(state, frozen, batch, key)
        norm = optax.global_norm(gradients)
        if self.clip is not None:
            share = jnp.minimum(1.0, self.clip / jnp.maximum(norm, 1e-12))
            gradients = jax.tree.map(lambda g: g * share.astype(g.dtype), gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.trainable, value=value)
        trainable = optax.apply_updates(state.trainable, updates)
        average = state.ema
        if self.ema is not None:
            t = state.step.astype(jnp.float32)
            rate = 1 - jnp.minimum(self.ema, (1 + t) / (10 + t))
            average = jax.tree.map(lambda old, new: old + rate.astype(old.dtype) * (new - old), average, trainable)
        rates = {name: jnp.asarray(rate(state.step), jnp.float32) for name, rate in self.rates.items()}
        told = {**metrics, **rates, "loss": value, "grad_norm": norm, STOP: stop.max()}
        return State(state.step + 1, trainable, optimizer, average), told

    def _gradients(self, state: State, frozen: Any, batch: Any, key: jax.Array) -> Any:
        """((loss, metrics), gradients): means over the parts of the batch."""
        trainable, loss = state.trainable, cast(Any, self.loss)
        if "step" in inspect.signature(loss).parameters:
            loss = functools.partial(loss, step=state.step)
        graded = jax.value_and_grad(loss, has_aux=True)
        if self.accumulate == 1:
            return graded(trainable, frozen, jax.tree.map(lambda a: a[0], batch), key)

        def part(total: Any, each: Any) -> tuple[Any, None]:
            number, rows = each
            with inside_loop():
                new = graded(trainable, frozen, rows, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, total, new), None

        first = jax.tree.map(lambda a: a[0], batch)
        shapes = jax.eval_shape(graded, trainable, frozen, first, key)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        total, _ = jax.lax.scan(part, zeros, (jnp.arange(self.accumulate), batch))
        return jax.tree.map(lambda a: a / self.accumulate, total)

    def compiled(self, state: State, frozen: Any) -> Program:
        """This as one program, which goes on from `state` and leaves each part of it where it lies."""
        return Program(self, state, frozen)


class Program:
    """A step as one program that overwrites the state it goes on from.

    Networks are taken apart once and not in every step: with the moments of its weights that takes a hundredth of a
    second and more. Where `pages` are prepared, the process keeps the memory of a small step from the
    first one on until `pages.give_back`.
    """

    def __init__(self, step: Step, state: State, frozen: Any):
        self.leaves, tree = jax.tree.flatten(state)
        self.frozen, frozen_tree = jax.tree.flatten(frozen)
        self.tree, mesh = tree, state.step.sharding.mesh.abstract_mesh

        def train_step(leaves: Any, frozen: Any, *inputs: Any) -> tuple[list[jax.Array], dict[str, jax.Array]]:
            # So that what loops over rows can have each device loop over its own.
            with jax.sharding.use_abstract_mesh(mesh), patiently(light):
                state, told = step(tree.unflatten(leaves), frozen_tree.unflatten(frozen), *inputs)
            return jax.tree.leaves(state), told

        (platform,) = {device.platform for device in state.step.sharding.device_set}
        light = compiler.is_light([*self.leaves, *self.frozen])
        self.keeps, self.begun = light and platform == "cpu" and pages.prepared(), False
        self.call = jax.jit(
            train_step, donate_argnums=0, out_shardings=([leaf.sharding for leaf in self.leaves], None),
            compiler_options=compiler.options(
                light, told=compiler.BARRIERS, own=compiler.OWN_BUT_SUMS, platform=platform
            ),
        )  # fmt: skip

    def __call__(self, batch: Any, stop: jax.Array, seed: Any) -> dict[str, jax.Array]:
        """The metrics of a step, whose state takes the place of the last one."""
        if self.keeps:  # What is not ready is waited for, and then computed, in another thread.
            jax.block_until_ready((batch, stop))
        self.leaves, told = self.call(self.leaves, self.frozen, batch, stop, seed)
        if self.keeps and not self.begun:
            pages.keep()
        self.begun = True
        return told

    def lower(self, *inputs: Any) -> jax.stages.Lowered:
        """As of `jax.jit`."""
        return self.call.lower(self.leaves, self.frozen, *inputs)

    @property
    def state(self) -> State:
        """What the next step goes on from, and overwrites."""
        return self.tree.unflatten(self.leaves)
