"""DPM-Solver-2 in the noise ratio r = sigma / alpha: k-diffusion's "DPM2" (KDPM2), arXiv:2206.00364, algorithm 2."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.options import kind_of
from sfumato.samplers.sigmas import KINDS, interleave, ratio_table, sigma_schedule, split, start_sigma, timestep_of
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPM2(Sampler):
    """The midpoint method, with the middle of log r (arXiv:2206.00927, algorithm 1): an Euler step there, and the whole
    step with the slope found there. The last step, to no noise at all, is an Euler step.

    `sigmas` is where the noise levels come from, one of `sigmas.KINDS`.
    """

    sigmas: str = "native"

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPM2:
        """As a `scheduler_config.json` says."""
        return cls(kind_of(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """2 `steps` - 1 rows: the beginning and the middle of every step, but one for the last."""
        whole = "round" if self.sigmas == "karras" else "keep"
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, whole=whole, final="zero")
        here, there = r[:-1], r[1:]
        middle = np.sqrt(here * there)
        alpha_next, _ = split(there)
        return ratio_table(
            interleave(t, timestep_of(schedule, middle[:-1])), interleave(here, middle), interleave(middle, there),
            start_row=2 * start, start_sigma=start_sigma(schedule, r[0]),
            second=interleave(np.zeros(steps), np.ones(steps)),
            slope=interleave(split(middle)[1], alpha_next * (there - here)),
            clean=interleave(alpha_next, 0 * here), keep=interleave(alpha_next * here, 0 * here),
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        """Where the step began, at the scale of its end."""
        return jnp.zeros_like(x)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        c = step.coefficients
        base = jnp.where(c["second"] > 0, state, step.alpha_next * x0)
        return base + c["slope"] * eps, c["clean"] * x0 + c["keep"] * eps
