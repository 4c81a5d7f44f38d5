"""Euler's method with fresh noise in every step: k-diffusion's "Euler a"."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.sigmas import KINDS, ancestral, ratio_table, sigma_schedule, split, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class EulerAncestral(Sampler):
    """An Euler step down to less noise than the row shall have, and noise on top of it: x' / alpha' = x0 + down eps +
    up noise, with down^2 + up^2 = r'^2 (k-diffusion's `sample_euler_ancestral`).

    `sigmas` is where the noise levels come from, one of `sigmas.KINDS`.
    """

    stochastic = True
    sigmas: str = "native"
    eta: float = dc.field(default=1.0, compare=False)
    """The share of noise that is fresh, in [0, 1]: 0 is Euler. It is data, as in `DDIM`."""

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> EulerAncestral:
        """As a `scheduler_config.json` says."""
        return cls()

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows. Raises SfumatoError also for an eta outside of [0, 1]."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, final="zero")
        down, up = ancestral(r, self.eta)
        alpha_next, _ = split(r[1:])
        return ratio_table(
            t, r[:-1], r[1:], start_row=start, start_sigma=start_sigma(schedule, r[0]),
            down=alpha_next * down, up=alpha_next * up,
        )  # fmt: skip

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        return step.alpha_next * x0 + c["down"] * eps + c["up"] * step.noise, state
