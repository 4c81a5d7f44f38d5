"""DPM-Solver++ and DPM-Solver, singlestep: every few rows begin anew, and the last of them leaps from the first."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from sfumato.errors import SfumatoError
from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.dpmpp_2m import check, common_options, dpm_levels, dpm_moments
from sfumato.samplers.sigmas import ratio_table
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DPMSinglestep(Sampler):
    """arXiv:2211.01095, algorithm 1, and arXiv:2206.00927, algorithms 1 and 2, as diffusers' DPMSolverSinglestep: the
    rows are evenly spread, and of the orders 1, ..., `order`, 1, ..., `order`, and so on.

    A row of order k starts from where its group began, with the estimates since then. The last row is of order 1 if
    it ends without noise, or if `lower_order_final`, and the groups come out even. `space` is "x0" (DPM-Solver++) or
    "eps" (DPM-Solver), `sigmas` one of `exponential.LEVELS`. Raises SfumatoError for settings that do not exist.
    """

    order: int = 2
    space: str = "x0"
    solver: str = "midpoint"
    sigmas: str = "native"
    lower_order_final: bool = False

    def __post_init__(self) -> None:
        known("solution", self.space, exponential.SPACES)
        check(self.order, self.solver, self.sigmas)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DPMSinglestep:
        """As a `scheduler_config.json` says. Raises SfumatoError for the stochastic algorithm types."""
        algorithm = options.get("algorithm_type", "dpmsolver++")
        if algorithm.startswith("sde"):
            raise SfumatoError(f"The singlestep algorithm type {algorithm} is not supported; the multistep one is.")
        given = {"lower_order_final": False, **options}
        settings = common_options(given)
        del settings["euler_at_final"]
        return cls(space="eps" if algorithm == "dpmsolver" else "x0", **settings)

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = dpm_levels(schedule, steps, self.sigmas)
        lam, begins = exponential.lambdas(r), self.begins(r, start)
        columns = np.zeros((1 + self.order, steps))
        for i, begin in enumerate(begins.tolist()):
            columns[0, i], factor = exponential.carry(float(r[begin]), float(r[i + 1]), self.space)
            weights = self.weights(lam[begin : i + 1] - lam[begin], lam[i + 1] - lam[begin])
            columns[1 : 1 + len(weights), i] = factor * weights[::-1]
        shares = dict(zip(["x", *(f"m{k}" for k in range(self.order))], columns, strict=True))
        shares["anew"] = (begins == np.arange(steps)).astype(float)
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=1.0, **shares)

    def begins(self, r: Float64[np.ndarray, " M"], start: int) -> Int[np.ndarray, " N"]:
        """The row in which the group of each row begins. Rows of equal noise do not share a group."""
        found, rows = [], len(r) - 1
        alone = r[-1] == 0 or (self.lower_order_final and rows % self.order == 0)
        for i in range(rows):
            anew = i <= start or i % self.order == 0 or (i == rows - 1 and alone) or r[i] == r[i - 1]
            found.append(i if anew else found[-1])
        return np.array(found)

    def weights(self, nodes: Float64[np.ndarray, " K"], h: float) -> Float64[np.ndarray, " K"]:
        """Of the estimates of a group, oldest first. Order 3 takes all of them ("heun"), or the first and the last."""
        if len(nodes) < 3:
            return exponential.weights(nodes, dpm_moments(h, len(nodes), self.solver, self.space))
        if self.solver == "heun":
            return exponential.weights(nodes, exponential.moments(h, 3, self.space))
        first, last = exponential.weights(nodes[[0, 2]], exponential.moments(h, 2, self.space))
        return np.array([first, 0.0, last])

    def init(self, x: Latents) -> State:
        return exponential.blank(x, self.order)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        begin, *past = state
        begin = jnp.where(step.coefficients["anew"] > 0, x, begin)
        estimates = (x0 if self.space == "x0" else eps, *past)
        return exponential.combine(begin, estimates, step), (begin, *estimates[: self.order - 1])
