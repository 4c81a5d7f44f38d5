"""Pseudo linear multistep (PLMS): PNDM as Stable Diffusion uses it, arXiv:2202.09778."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.options import only
from sfumato.samplers.sigmas import FLOOR, levels
from sfumato.schedule import Schedule
from sfumato.types import Step

WEIGHTS = np.array([
    [1, 0, 0, 0], [1 / 2, 1 / 2, 0, 0], [3 / 2, -1 / 2, 0, 0], [23 / 12, -16 / 12, 5 / 12, 0],
    [55 / 24, -59 / 24, 37 / 24, -9 / 24],
])  # fmt: skip
"""Adams-Bashforth, newest first: the first two rows make the first step, and its correction."""


@final
@dc.dataclass(frozen=True)
class PNDM(Sampler):
    """DDIM's step with a mixture of the last four estimates (eq. 12), without the Runge-Kutta start of the paper
    (`skip_prk_steps`): the first step is taken, looked at from its end, and taken again with the mean of both.

    So there is one row more than steps. Four things differ from diffusers. A step ends at the next timestep that is
    visited (see `DDIM`). From step `start` on the rows are those of a run that begins there, while the pipelines of
    diffusers cut off the list of timesteps and so lose a step: they take what follows for the correction of the first
    step. What is mixed is always eps, as in the paper: mixing v, diffusers is of first order only, no better than
    DDIM. And zero terminal SNR works; as eps says nothing there about the picture, the first step is not corrected.
    """

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> PNDM:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, skip_prk_steps=True)
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` + 1 rows, or 1 for a single step. A run of the last step alone has no second row to correct it."""
        t = schedule.timesteps(steps)
        alpha, sigma = levels(schedule, t, schedule.set_alpha_to_one, FLOOR)
        count = steps + (steps > 1)
        first = start + (steps > 1 and start >= steps - 1)  # the row that begins anew
        row = np.arange(count)
        # Which step a row belongs to, where its latents are, and which of the weights it takes.
        of = np.where(row > first, row - 1, np.minimum(row, steps - 1))
        again = row == first + 1
        at, weights = of + again, WEIGHTS[np.clip(row - first, 0, 4)]
        weights[again & (alpha[of] ** 2 <= FLOOR)] = [0, 1, 0, 0]
        keep = alpha[of + 1] / alpha[of]
        return make_table(
            t[at], alpha[at], sigma[at], alpha[of + 1], sigma[of + 1], start_row=first, start_sigma=1.0, again=again,
            keep=keep, move=sigma[of + 1] - keep * sigma[of], **{f"w{k}": weights[:, k] for k in range(4)},
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        """The latents before the first step, and the last three eps, newest first."""
        return x, (jnp.zeros_like(x),) * 3

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        c, (before, past) = step.coefficients, state
        again = c["again"] > 0
        x = jnp.where(again, before, x)
        mixed = sum(c[f"w{k}"] * each for k, each in enumerate((eps, *past)))
        past = tuple(jnp.where(again, old, newer) for old, newer in zip(past, (eps, *past[:2]), strict=True))
        return c["keep"] * x + c["move"] * mixed, (x, past)
