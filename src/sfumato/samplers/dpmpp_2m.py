"""DPM-Solver++(2M) and its relatives: solvers that look back at the last estimates."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Mapping
from typing import Any, final

import numpy as np
from jaxtyping import Float64, Int

from sfumato.errors import SfumatoError
from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.sigmas import ratio_table
from sfumato.schedule import Schedule, known
from sfumato.types import Step

SOLVERS = ("midpoint", "heun")


@final
@dc.dataclass(frozen=True)
class DPMpp2M(Sampler):
    """arXiv:2211.01095, algorithm 2 (order 2 in x0, "midpoint"), in the variants of diffusers' DPMSolverMultistep.

    `order` is 1 (DDIM), 2 or 3; `space` "x0" (DPM-Solver++) or "eps" (DPM-Solver, arXiv:2206.00927, made multistep).
    With fewer than 15 steps `lower_order_final` lowers the order of the last two rows; the last one is of order 1
    also if `euler_at_final`, and always where it ends without noise. `sigmas` is one of `exponential.LEVELS`.

    Raises SfumatoError for settings that do not exist.
    """

    order: int = 2
    space: str = "x0"
    solver: str = "midpoint"
    sigmas: str = "native"
    lower_order_final: bool = True
    euler_at_final: bool = False

    def __post_init__(self) -> None:
        known("solution", self.space, exponential.SPACES)
        check(self.order, self.solver, self.sigmas)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPMpp2M:
        """As a `scheduler_config.json` says; the stochastic algorithm types mean their deterministic counterparts."""
        space = "eps" if options.get("algorithm_type", "").endswith("dpmsolver") else "x0"
        return cls(space=space, **common_options(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = dpm_levels(schedule, steps, self.sigmas)
        order = dpm_orders(r, start, self.order, self.lower_order_final, self.euler_at_final)
        rule = functools.partial(dpm_moments, solver=self.solver, space=self.space)
        shares = exponential.multistep(r, order, rule, width=self.order, space=self.space)
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=1.0, **shares)

    def init(self, x: Latents) -> State:
        return exponential.blank(x, self.order - 1)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        estimates = (x0 if self.space == "x0" else eps, *state)
        return exponential.combine(x, estimates, step), estimates[: self.order - 1]


def check(order: int, solver: str, sigmas: str) -> None:
    """Raises SfumatoError for settings that do not exist."""
    known("solver type", solver, SOLVERS)
    known("noise spacing", sigmas, exponential.LEVELS)
    if order not in (1, 2, 3):
        raise SfumatoError(f"DPM-Solver has the orders 1, 2 and 3, not {order}.")


def common_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that all multistep DPM-Solvers share, from a `scheduler_config.json`; a solver type that is another
    sampler's (logrho, bh1, bh2) means midpoint, as it does to diffusers."""
    solver = options.get("solver_type", "midpoint")
    return {
        "order": options.get("solver_order", 2),
        "solver": "midpoint" if solver in ("logrho", "bh1", "bh2") else solver,
        "sigmas": exponential.levels_option(options),
        "lower_order_final": options.get("lower_order_final", True),
        "euler_at_final": options.get("euler_at_final", False),
    }


def dpm_levels(
    schedule: Schedule, steps: int, sigmas: str
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N+1"]]:
    """`exponential.levels`, where diffusers cuts off all fractions of timesteps for one of the beta schedules."""
    whole = "floor" if schedule.beta_schedule == "squaredcos_cap_v2" else "round"
    return exponential.levels(schedule, steps, sigmas, whole=whole)


def dpm_orders(
    r: Float64[np.ndarray, " M"], start: int, order: int, lower_order_final: bool, euler_at_final: bool
) -> Int[np.ndarray, " N"]:
    """The order of each row."""
    last = (2, 1) if lower_order_final and len(r) - 1 < 15 else (1,) if euler_at_final or r[-1] == 0 else ()
    return exponential.orders(exponential.lambdas(r), start, order, last)


def dpm_moments(h: float, order: int, solver: str, space: str = "x0") -> list[float]:
    """The moments that DPM-Solver takes: "midpoint" approximates the one of order 2, and that of order 3 is half of
    what the integral gives, in the authors' program and in all that followed it."""
    found = exponential.moments(h, order, space)
    if order == 2 and solver == "midpoint":
        found[1] = found[0] * h / 2
    if order == 3:
        found[2] /= 2
    return found
