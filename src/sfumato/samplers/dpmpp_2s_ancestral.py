"""DPM-Solver++(2S) with ancestral noise."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.halfway import halfway_init, halfway_step, halfway_table
from sfumato.samplers.sigmas import KINDS, ancestral, sigma_schedule, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPMpp2SAncestral(Sampler):
    """arXiv:2211.01095, algorithm 1 with the middle of log r, ending at the "down" ratio of an ancestral step, with
    fresh noise on top (k-diffusion's sample_dpmpp_2s_ancestral).

    `eta` in [0, 1] is the share of ancestral noise: 0 is DPM-Solver++(2S) itself. `s_noise` multiplies the noise.
    `sigmas` is one of `sigmas.KINDS`. diffusers has no such sampler.
    """

    stochastic = True
    sigmas: str = "native"
    eta: float = dc.field(default=1.0, compare=False)
    s_noise: float = dc.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPMpp2SAncestral:
        """As a `scheduler_config.json` says."""
        return cls(sigmas=exponential.levels_option(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """2 `steps` - 1 rows. Raises SfumatoError for an `eta` outside of [0, 1], too."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, final="zero")
        down, up = ancestral(r, self.eta)
        middle = np.sqrt(r[:-1] * down)
        return halfway_table(
            schedule, t, r, middle, start=start, start_sigma=start_sigma(schedule, r[0]),
            first=(middle, 0 * up), second=(down, self.s_noise * up),
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        return halfway_init(x)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        return halfway_step(x, x0, step, state)
