"""DDIM backwards: from a picture to the noise that DDIM would make it of. arXiv:2010.02502, section 4.3."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table, make_table
from sfumato.samplers.options import limit
from sfumato.samplers.sigmas import levels
from sfumato.schedule import Schedule
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DDIMInverse(Sampler):
    """x' = alpha' x0 + sigma' eps as in DDIM without noise, but towards more of it: row k undoes row N - 1 - k of DDIM.

    In either row the network is told the timestep of the noisier end, while `alpha` and `sigma` are those of the
    latents that it sees. So an eps that does not change along the way gives exactly DDIM's latents back.

    `start` counts from the clean end. As with DDIM a step ends at the next timestep that is visited, where diffusers
    takes equal strides.
    """

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DDIMInverse:
        """As a `scheduler_config.json` says."""
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows, from the picture to the noisiest timestep of DDIM."""
        t = schedule.timesteps(steps)
        alpha, sigma = (level[::-1] for level in levels(schedule, t, schedule.set_alpha_to_one))
        clip = np.full(steps, limit(schedule))
        return make_table(t[::-1], alpha[:-1], sigma[:-1], alpha[1:], sigma[1:], start_row=start, clip=clip)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        clip = step.coefficients["clip"]
        return step.alpha_next * jnp.clip(x0, -clip, clip) + step.sigma_next * eps, state
