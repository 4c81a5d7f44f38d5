"""DDPM's ancestral sampling, arXiv:2006.11239, on any subset of the timesteps."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.options import limit, only
from sfumato.samplers.sigmas import levels
from sfumato.schedule import Schedule, known
from sfumato.types import Step

VARIANCES = ("fixed_small", "fixed_large")


@final
@dc.dataclass(frozen=True)
class DDPM(Sampler):
    """x' = the mean of q(x' | x, x0) (eq. 7) plus noise, of the posterior's own variance ("fixed_small") or of beta
    ("fixed_large", section 3.2), where beta is what lies between two visited timesteps (arXiv:2102.09672, eq. 19).

    No noise is added in the last step (algorithm 2); diffusers leaves it out only if that is timestep 0, and so ends
    "fixed_large" with a noisy picture wherever it is not. Raises SfumatoError for another variance.
    """

    stochastic = True
    variance: str = "fixed_small"

    def __post_init__(self) -> None:
        known("variance", self.variance, VARIANCES)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DDPM:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, thresholding=False)
        return cls((options.get("variance_type") or "fixed_small").removesuffix("_log"))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t = schedule.timesteps(steps)
        alpha, sigma = levels(schedule, t, clean=True)
        (a, a_next), (v, v_next) = (alpha[:-1], alpha[1:]), (sigma[:-1] ** 2, sigma[1:] ** 2)
        beta = 1 - (a / a_next) ** 2
        variance = beta if self.variance == "fixed_large" else beta * v_next / v
        return make_table(
            t, a, sigma[:-1], a_next, sigma[1:], start_row=start, clip=np.full(steps, limit(schedule)),
            x0=a_next * beta / v, x=a / a_next * v_next / v, noise=np.sqrt(variance) * (v_next > 0),
        )  # fmt: skip

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        return c["x0"] * jnp.clip(x0, -c["clip"], c["clip"]) + c["x"] * x + c["noise"] * step.noise, state
