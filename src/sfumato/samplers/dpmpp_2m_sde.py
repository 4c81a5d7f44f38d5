"""SDE-DPM-Solver++(2M): DPM-Solver++ that takes out more noise than it should, and adds new noise in its place."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.dpmpp_2m import check, common_options, dpm_levels, dpm_moments, dpm_orders
from sfumato.samplers.sigmas import ratio_table, split
from sfumato.schedule import Schedule
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPMpp2MSDE(Sampler):
    """arXiv:2211.01095, SDE-DPM-Solver++(2M) (eta = 1, order 2, "midpoint"); any `eta` as in k-diffusion.

    The stochastic equation with noise share eta has the exact solution

        x_t = sigma_t / sigma_s e^(-eta h) x_s + (1 + eta) alpha_t int_0^h e^((1 + eta) (u - h)) x0(lambda_s + u) du
              + sigma_t sqrt(1 - e^(-2 eta h)) z

    so the moments are those of DPM-Solver++ for a step of (1 + eta) h; eta = 0 is DPM-Solver++. `s_noise` multiplies
    the noise; the other settings are those of `DPMpp2M`. Of order 3 the sum is the same expansion; diffusers 0.42 has
    -1/2 for +1/2 in the factor of its last term, which then does not vanish with h.

    Raises SfumatoError for settings that do not exist.
    """

    stochastic = True
    order: int = 2
    solver: str = "midpoint"
    sigmas: str = "native"
    lower_order_final: bool = True
    euler_at_final: bool = False
    eta: float = dc.field(default=1.0, compare=False)
    s_noise: float = dc.field(default=1.0, compare=False)

    def __post_init__(self) -> None:
        check(self.order, self.solver, self.sigmas)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPMpp2MSDE:
        """As a `scheduler_config.json` says. Raises SfumatoError for the algorithm type sde-dpmsolver, which
        takes eps."""
        if options.get("algorithm_type") == "sde-dpmsolver":
            raise SfumatoError("The algorithm type sde-dpmsolver is not supported; sde-dpmsolver++ is.")
        return cls(**common_options(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = dpm_levels(schedule, steps, self.sigmas)
        order = dpm_orders(r, start, self.order, self.lower_order_final, self.euler_at_final)
        shares = exponential.multistep(r, order, self.moments, width=self.order)
        h = np.maximum(np.diff(exponential.lambdas(r)), 0)  # where levels repeat, rounding may make it less
        shares["x"] *= np.exp(-self.eta * h)
        shares["noise"] = self.s_noise * split(r[1:])[1] * np.sqrt(-np.expm1(-2 * self.eta * h))
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=1.0, **shares)

    def moments(self, h: float, order: int) -> list[float]:
        """Those of powers of u, from those of powers of (1 + eta) u."""
        faster = 1 + self.eta
        return [moment / faster**k for k, moment in enumerate(dpm_moments(h * faster, order, self.solver))]

    def init(self, x: Latents) -> State:
        return exponential.blank(x, self.order - 1)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        estimates = (x0, *state)
        x = exponential.combine(x, estimates, step) + step.coefficients["noise"] * step.noise
        return x, estimates[: self.order - 1]
