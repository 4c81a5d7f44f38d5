"""Trajectory consistency distillation's strategic stochastic sampling, arXiv:2402.19159."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.lcm import distilled_timesteps
from sfumato.samplers.options import share
from sfumato.samplers.sigmas import levels
from sfumato.schedule import Schedule
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class TCD(Sampler):
    """Along the trajectory to timestep s = (1 - eta) t', below the next one, and with fresh noise up to t' (algorithm
    4, where eta is called gamma): eta 0 is deterministic, eta 1 starts anew from the clean estimate in every step.

    A run ends at training timestep 0, as in diffusers. The timesteps are those of `LCM`.
    """

    stochastic = True
    eta: float = dc.field(default=0.3, compare=False)
    """In [0, 1]. It is data, as in `DDIM`."""
    original_steps: int | None = None
    """As in `LCM`."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TCD:
        """As a `scheduler_config.json` says."""
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows. Raises SfumatoError also for more steps than the distillation took, or a wrong eta."""
        t = distilled_timesteps(schedule, steps, self.original_steps)
        alpha, sigma = levels(schedule, t, clean=False)
        below = np.floor((1 - share("eta", self.eta)) * np.append(t[1:], 0.0) + 1e-6)  # 0.7 * 130 is 91, not 90.99
        alpha_below, sigma_below = schedule.at(below)
        a_next = alpha[1:]
        return make_table(
            t, alpha[:-1], sigma[:-1], a_next, sigma[1:], start_row=start,
            eps=a_next / alpha_below * sigma_below, noise=np.sqrt(np.maximum(1 - (a_next / alpha_below) ** 2, 0)),
        )  # fmt: skip

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        return step.alpha_next * x0 + c["eps"] * eps + c["noise"] * step.noise, state
