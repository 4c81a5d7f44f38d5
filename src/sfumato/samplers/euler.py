"""Euler's method on the probability-flow equation, in the noise ratio r = sigma / alpha."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.options import kind_of, only
from sfumato.samplers.sigmas import KINDS, ratio_table, sigma_schedule, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class Euler(Sampler):
    """d(x / alpha) / dr = eps (arXiv:2206.00364, algorithm 1 with sigma(t) = t and without churn).

    The Euler step from x / alpha = x0 + r eps ends at x0 + r' eps: it is DDIM without noise, only that its timesteps
    may have fractions. `sigmas` is where the noise levels come from, one of `sigmas.KINDS`.
    """

    sigmas: str = "native"

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Euler:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, interpolation_type="linear", timestep_type="discrete", sigma_min=None, sigma_max=None)
        return cls(kind_of(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas)
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=start_sigma(schedule, r[0]))

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        return step.alpha_next * x0 + step.sigma_next * eps, state
