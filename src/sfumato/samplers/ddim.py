"""DDIM, arXiv:2010.02502."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.options import limit, only, share
from sfumato.samplers.sigmas import levels
from sfumato.schedule import Schedule
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DDIM(Sampler):
    """x' = alpha' x0 + sqrt(sigma'^2 - s^2) eps + s noise (eq. 12), with s = eta sigma' / sigma sqrt(1 - (alpha /
    alpha')^2) (eq. 16): eta 0 is deterministic, eta 1 is DDPM.

    Where the schedule says `clip_sample`, x0 is clipped and eps is not. A step always ends at the next timestep that is
    visited. diffusers ends it 1000 // steps below the present one, which is the same for leading spacing, but misses
    with linspace, and with trailing where `steps` does not divide 1000.
    """

    stochastic = True
    eta: float = dc.field(default=0.0, compare=False)
    """In [0, 1]; a number in the table, so that samplers which differ in nothing else are one to the compiler."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DDIM:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, thresholding=False)
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows. Raises SfumatoError also for an eta outside of [0, 1]."""
        eta = share("eta", self.eta)
        t = schedule.timesteps(steps)
        alpha, sigma = levels(schedule, t, schedule.set_alpha_to_one)
        noise = eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - (alpha[:-1] / alpha[1:]) ** 2)
        towards = np.sqrt(np.maximum(sigma[1:] ** 2 - noise**2, 0))
        clip = np.full(steps, limit(schedule))
        return make_table(
            t, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], start_row=start, towards=towards, noise=noise, clip=clip
        )

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        x0 = jnp.clip(x0, -c["clip"], c["clip"])
        return step.alpha_next * x0 + c["towards"] * eps + c["noise"] * step.noise, state
