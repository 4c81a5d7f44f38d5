"""What DPM++ 2S ancestral and DPM++ SDE share: half a step, a look from there, and the whole step from the beginning.

Both are written in the noise ratio r = sigma / alpha, with "down" the ratio that a stage steps down to before it adds
fresh noise of the ratio "up" (see `sigmas.ancestral`).
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

from sfumato.samplers.base import Latents, State, Table
from sfumato.samplers.sigmas import interleave, ratio_table, split, timestep_of
from sfumato.schedule import Schedule
from sfumato.types import Step

Ratios = Float64[np.ndarray, " N"]


def halfway_table(
    schedule: Schedule, t: Ratios, r: Float64[np.ndarray, " M"], middle: Ratios, *, start: int, start_sigma: float,
    first: tuple[Ratios, Ratios], second: tuple[Ratios, Ratios],
) -> Table:  # fmt: skip
    """2N - 1 rows: from `r[i]` to `middle[i]`, and again from `r[i]` to `r[i + 1]`, but for the last step, which ends
    without noise. `first` and `second` are the (down, up) of the stages."""
    here, there = r[:-1], r[1:]
    begin, after = interleave(here, here), interleave(middle, there)
    down, up = (interleave(a, b) for a, b in zip(first, second, strict=True))
    again = interleave(np.zeros(len(t)), np.ones(len(t)))
    alpha, alpha_next = split(begin)[0], split(after)[0]
    kept = alpha_next / alpha * down / begin
    return ratio_table(
        interleave(t, timestep_of(schedule, middle[:-1])), interleave(here, middle), after,
        start_row=2 * start, start_sigma=start_sigma, x=kept * (1 - again), begin=kept * again,
        x0=alpha_next * (1 - down / begin), noise=alpha_next * up,
    )  # fmt: skip


def halfway_init(x: Latents) -> State:
    """Where a step begins."""
    return jnp.zeros_like(x)


def halfway_step(x: Latents, x0: Latents, step: Step, begin: State) -> tuple[Latents, State]:
    """An Euler step over log r from `x` in the first stage, and from where that began in the second."""
    share = step.coefficients
    return share["x"] * x + share["begin"] * begin + share["x0"] * x0 + share["noise"] * step.noise, x
