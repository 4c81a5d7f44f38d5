"""Heun's method in the noise ratio r = sigma / alpha, arXiv:2206.00364."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.options import kind_of, only
from sfumato.samplers.sigmas import KINDS, interleave, ratio_table, sigma_schedule, split, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class Heun(Sampler):
    """An Euler step, and the same step again with the mean of the slopes at both of its ends (algorithm 1, without
    churn); the last step, to no noise at all, stays an Euler step.

    `sigmas` is where the noise levels come from, one of `sigmas.KINDS`.
    """

    sigmas: str = "native"

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Heun:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, clip_sample=False)
        return cls(kind_of(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """2 `steps` - 1 rows: the two ends of every step, but one for the last."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, final="zero")
        here, there = r[:-1], r[1:]
        alpha_next, sigma_next = split(there)
        return ratio_table(
            interleave(t, t[1:]), interleave(here, there), interleave(there, there), start_row=2 * start,
            start_sigma=start_sigma(schedule, r[0]), second=interleave(np.zeros(steps), np.ones(steps)),
            slope=interleave(sigma_next, alpha_next * (there - here) / 2),
            keep=interleave(alpha_next * (here + there) / 2, 0 * here),
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        """Where the step would end without the slope at its end."""
        return jnp.zeros_like(x)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        c = step.coefficients
        clean = step.alpha_next * x0
        base = jnp.where(c["second"] > 0, state, clean)
        return base + c["slope"] * eps, clean + c["keep"] * eps
