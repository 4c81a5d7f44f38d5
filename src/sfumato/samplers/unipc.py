"""UniPC: a predictor, and a corrector that uses the next evaluation once more."""

from __future__ import annotations

import dataclasses as dc
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


@final
@dc.dataclass(frozen=True)
class UniPC(Sampler):
    """arXiv:2302.04867 (multistep, with B(h)), as diffusers' UniPCMultistep.

    Row i predicts x_(i+1) from the last `order` estimates. Row i + 1 evaluates the network there, computes x_(i+1)
    anew with the new estimate among the others, and goes on from that: one evaluation a row. Both are sums with exact
    weights but for polynomials through two estimates, where B(h) stands in: h ("bh1") or e^h - 1 ("bh2").

    Steps in `uncorrected` (their numbers; diffusers' disable_corrector) keep the prediction. `lower_order_final` goes
    down to order 1 in the last rows; the last one is of order 1 also where it ends without noise. `space` is "x0" or
    "eps" (predict_x0 false), `sigmas` one of `exponential.LEVELS`.

    Raises SfumatoError for settings that do not exist.
    """

    order: int = 2
    space: str = "x0"
    solver: str = "bh2"
    sigmas: str = "native"
    lower_order_final: bool = True
    uncorrected: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        known("solver type", self.solver, ("bh1", "bh2"))
        known("solution", self.space, exponential.SPACES)
        known("noise spacing", self.sigmas, exponential.LEVELS)
        if self.order < 1:
            raise SfumatoError(f"The order of UniPC is at least 1, not {self.order}.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> UniPC:
        """As a `scheduler_config.json` says; a solver type that is another sampler's means bh2, as to diffusers."""
        solver = options.get("solver_type", "bh2")
        return cls(
            order=options.get("solver_order", 2),
            space="x0" if options.get("predict_x0", True) else "eps",
            solver="bh2" if solver in ("midpoint", "heun", "logrho") else solver,
            sigmas=exponential.levels_option(options),
            lower_order_final=options.get("lower_order_final", True),
            uncorrected=tuple(options.get("disable_corrector") or ()),
        )

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = exponential.levels(schedule, steps, self.sigmas)
        last = tuple(range(self.order, 0, -1)) if self.lower_order_final else (1,) if r[-1] == 0 else ()
        order = exponential.orders(exponential.lambdas(r), start, self.order, last)
        shares = exponential.multistep(r, order, self.moments, width=self.order, space=self.space)
        shares |= self.corrector(r, order, start)
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=1.0, **shares)

    def moments(self, h: float, count: int) -> list[float]:
        """The exact ones; through two estimates the second is B(h) / 2 times h."""
        found = exponential.moments(h, count, self.space)
        if count == 2:
            scale = 1 if self.space == "x0" else np.exp(-h)  # the moments of eps are e^-h times the paper's
            found[1] = h / 2 * (found[0] if self.solver == "bh2" else h * scale)
        return found

    def corrector(
        self, r: Float64[np.ndarray, " M"], order: Int[np.ndarray, " N"], start: int
    ) -> dict[str, Float64[np.ndarray, " N"]]:
        """How much a row takes of the x it is given, of the x before ("before"), of the new estimate ("new") and of
        those before ("c0", ...): all of the first alone, or none of it."""
        lam, rows = exponential.lambdas(r), len(order)
        given, columns = np.ones(rows), np.zeros((2 + self.order, rows))
        for i in range(start + 1, rows):
            h = lam[i] - lam[i - 1]
            if h == 0 or i - 1 in self.uncorrected:
                continue
            count = int(order[i - 1])
            nodes = lam[i - count : i + 1][::-1] - lam[i - 1]
            given[i] = 0
            columns[0, i], factor = exponential.carry(r[i - 1], r[i], self.space)
            columns[1 : 2 + count, i] = factor * exponential.weights(nodes, self.moments(h, count + 1))
        names = ["before", "new", *(f"c{k}" for k in range(self.order))]
        return {"given": given, **dict(zip(names, columns, strict=True))}

    def init(self, x: Latents) -> State:
        return exponential.blank(x, 1 + self.order)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        before, *past = state
        new, share = (x0 if self.space == "x0" else eps), step.coefficients
        x = share["given"] * x + share["before"] * before + share["new"] * new
        x = x + sum(share[f"c{k}"] * estimate for k, estimate in enumerate(past))
        estimates = (new, *past)[: self.order]
        return exponential.combine(x, estimates, step), (x, *estimates)
