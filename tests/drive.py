"""Runs of the loop as the laws look at them: short ones, counted ones, and some in double precision."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sfumato import generate, noise, run
from sfumato.controls import Request
from sfumato.models.controlnet import ControlNet
from sfumato.plan import make_plan
from sfumato.sample import sample
from sfumato.samplers import DDIM

from table import ALL, PROMPTS, ROWS, Controls


def pictures(model, controls: Controls, chosen: Sequence[int] = ALL, **changes: Any) -> np.ndarray:
    """Latents (or pixels, for output="images") of the chosen pictures; each has its own prompt and seed."""
    settings = {
        "prompt": [PROMPTS[number] for number in chosen], "negative": "blurry", "seed": [7 + n for n in chosen],
        "steps": ROWS, "size": (16, 16), "sampler": DDIM(), "output": "latents",
    } | changes  # fmt: skip
    made = generate(model, controls=controls, **settings)
    return np.asarray(made) if settings["output"] == "latents" else np.stack([picture.array for picture in made])


def changed_nets(change: Callable[[Any], Any], controls: Controls) -> Controls:
    """The controls, those that have a network of their own with a changed one."""
    return tuple(dc.replace(each, net=change(each.net)) if hasattr(each, "net") else each for each in controls)


EXECUTIONS = [0]


@functools.cache
def counted(network: Any) -> Any:
    """The network, which adds one to `EXECUTIONS` whenever it runs."""

    way = "residuals" if isinstance(network, ControlNet) else "__call__"  # as the loop has it

    def count() -> None:
        EXECUTIONS[0] += 1

    def call(self, *args, **kwargs):
        jax.debug.callback(count)
        return getattr(type(network), way)(self, *args, **kwargs)

    copy = jax.tree.map(lambda a: a, network)
    object.__setattr__(copy, "__class__", type("Counted", (type(network),), {way: call}))
    return copy


def in_float64(model, controls: Controls) -> np.ndarray:
    """The loop in double precision; four networks are more than it takes."""
    arguments = prepared(model, controls)
    with jax.enable_x64(True):
        wide = [jax.tree.map(widened, argument) for argument in arguments]
        return np.asarray(sample(*wide[:1], DDIM(), *wide[1:], model.schedule.prediction_type))


def widened(a: Any) -> Any:
    return jnp.asarray(a, jnp.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a


def prepared(model, controls: Controls) -> list[Any]:
    """What the loop is called with: network, rows, controls, latents, conditioning."""
    plan = make_plan(model, PROMPTS, "blurry", 1, 7, (16, 16))
    start = noise.starting(plan.seeds, plan.latent_shape)
    read = run.reader(model, plan, [text for each in controls for text in each.texts()], weights=True, clip_skip=0)
    request = Request(
        model, plan.prompts, ["blurry"] * 8, plan.size, start, True, read,
        lambda pixels: run.encode_image(model.vae, pixels, False),
    )  # fmt: skip
    columns = run.columns(DDIM().table(model.schedule, ROWS), noise.per_step(plan.seeds, ROWS, plan.latent_shape))
    steps = jax.tree.map(jnp.asarray, columns)
    base = run.conditionings(plan, read)
    return [model.unet, steps, tuple(control.prepare(request) for control in controls), start, base]
