"""DPM-Solver-2 with fresh noise in every step: k-diffusion's "DPM2 a" (KDPM2 ancestral)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.options import kind_of
from sfumato.samplers.sigmas import (
    KINDS,
    ancestral,
    interleave,
    ratio_table,
    sigma_schedule,
    split,
    start_sigma,
    timestep_of,
)
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPM2Ancestral(Sampler):
    """`DPM2` down to less noise than the step shall end with, and noise on top of it as in `EulerAncestral`
    (k-diffusion's `sample_dpm_2_ancestral`). Noise is added in the second row of a step; the draw of its first goes
    unused.

    `sigmas` is where the noise levels come from, one of `sigmas.KINDS`.
    """

    stochastic = True
    sigmas: str = "native"
    eta: float = dc.field(default=1.0, compare=False)
    """The share of noise that is fresh, in [0, 1]: 0 is `DPM2`. It is data, as in `DDIM`."""

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPM2Ancestral:
        """As a `scheduler_config.json` says."""
        return cls(kind_of(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """2 `steps` - 1 rows, as `DPM2`. Raises SfumatoError also for an eta outside of [0, 1]."""
        whole = "round" if self.sigmas == "karras" else "keep"
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, whole=whole, final="zero")
        here, there = r[:-1], r[1:]
        down, up = ancestral(r, self.eta)
        middle = np.sqrt(here * down)
        alpha_next, _ = split(there)
        return ratio_table(
            interleave(t, timestep_of(schedule, middle[:-1])), interleave(here, middle), interleave(middle, there),
            start_row=2 * start, start_sigma=start_sigma(schedule, r[0]),
            second=interleave(np.zeros(steps), np.ones(steps)), noise=interleave(0 * here, alpha_next * up),
            slope=interleave(split(middle)[1], alpha_next * (down - here)),
            clean=interleave(alpha_next, 0 * here), keep=interleave(alpha_next * here, 0 * here),
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        """Where the step began, at the scale of its end."""
        return jnp.zeros_like(x)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        assert step.noise is not None
        c = step.coefficients
        base = jnp.where(c["second"] > 0, state, step.alpha_next * x0)
        return base + c["slope"] * eps + c["noise"] * step.noise, c["clean"] * x0 + c["keep"] * eps
