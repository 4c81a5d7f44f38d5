"""Sampling from latent consistency models, arXiv:2310.04378."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.errors import SfumatoError
from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.options import limit, only
from sfumato.samplers.sigmas import levels
from sfumato.schedule import Schedule
from sfumato.types import Step

SIGMA_DATA = 0.5


@final
@dc.dataclass(frozen=True)
class LCM(Sampler):
    """The consistency function f = c_skip x + c_out x0 (eq. 9), noised anew to the next timestep (algorithm 3).

    The timesteps are spread over those of the solver that the model was distilled with.
    """

    stochastic = True
    original_steps: int | None = None
    """How many steps that solver took; None is what the schedule says, or else 50."""

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LCM:
        """As a `scheduler_config.json` says. Raises SfumatoError for what is not supported."""
        only(options, thresholding=False)
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows. Raises SfumatoError also for more steps than the solver took."""
        t = distilled_timesteps(schedule, steps, self.original_steps)
        alpha, sigma = levels(schedule, t, clean=True)
        scaled = t * schedule.options.get("timestep_scaling", 10.0)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        out = scaled / np.hypot(scaled, SIGMA_DATA)
        return make_table(
            t, alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], start_row=start,
            x0=alpha[1:] * out, x=alpha[1:] * skip, clip=np.full(steps, limit(schedule)),
        )  # fmt: skip

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        return c["x0"] * jnp.clip(x0, -c["clip"], c["clip"]) + c["x"] * x + step.sigma_next * step.noise, state


def distilled_timesteps(schedule: Schedule, steps: int, original: int | None) -> np.ndarray:
    """[steps] timesteps, noisiest first, out of the `original` ones of a distillation (for TCD, too).

    Raises SfumatoError for a number of steps that they do not have.
    """
    original = int(original or schedule.options.get("original_inference_steps", 50))
    trained = schedule.num_train_timesteps
    if not 1 <= steps <= original <= trained:
        raise SfumatoError(
            f"A model distilled from {original} steps of {trained} timesteps samples in 1 to {min(original, trained)}"
            f" steps, not in {steps}."
        )
    solver = np.arange(original, 0, -1) * (trained // original) - 1.0
    return solver[np.floor(np.linspace(0, original, steps, endpoint=False)).astype(int)]
