"""DPM++ SDE: two stochastic stages a step."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.halfway import halfway_init, halfway_step, halfway_table
from sfumato.samplers.sigmas import KINDS, ancestral, interleave, sigma_schedule, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPMppSDE(Sampler):
    """DPM-Solver++ on the stochastic equation, with an ancestral step to the middle of log r, and one to the end with
    the estimate found there (k-diffusion's sample_dpmpp_sde, diffusers' DPMSolverSDE).

    Those draw the noise of both stages from one Brownian path, so that it is correlated; here it is independent.
    `eta` in [0, 1] is the share of ancestral noise: 0 is DPM-Solver++(2S). `s_noise` multiplies the noise. `sigmas` is
    one of `sigmas.KINDS`.
    """

    stochastic = True
    sigmas: str = "native"
    eta: float = dc.field(default=1.0, compare=False)
    s_noise: float = dc.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPMppSDE:
        """As a `scheduler_config.json` says."""
        return cls(sigmas=exponential.levels_option(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """2 `steps` - 1 rows. Raises SfumatoError for an `eta` outside of [0, 1], too."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, final="zero")
        middle = np.sqrt(r[:-1] * r[1:])
        halves = np.append(interleave(r[:-1], middle), middle[-1])
        stages = [(down, self.s_noise * up) for down, up in (ancestral(halves, self.eta), ancestral(r, self.eta))]
        return halfway_table(
            schedule, t, r, middle, start=start, start_sigma=start_sigma(schedule, r[0]),
            first=(stages[0][0][::2], stages[0][1][::2]), second=stages[1],
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        return halfway_init(x)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        return halfway_step(x, x0, step, state)
