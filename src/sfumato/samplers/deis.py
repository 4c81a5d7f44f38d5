"""DEIS: the exponential Adams-Bashforth method on the noise."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Mapping
from typing import Any, final

from sfumato.errors import SfumatoError
from sfumato.samplers import exponential
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.sigmas import ratio_table
from sfumato.schedule import Schedule, known
from sfumato.types import Step


@final
@dc.dataclass(frozen=True)
class DEIS(Sampler):
    """arXiv:2204.13902, with polynomials in log(sigma / alpha) ("logrho"), as diffusers' DEISMultistep.

    The paper's integral over rho = sigma / alpha is the one over lambda = -log rho. Runs end at the lowest trained
    noise, not at zero. `order` is 1 (DDIM), 2 or 3; with fewer than 15 steps `lower_order_final` lowers that of the
    last two rows. `sigmas` is one of `exponential.LEVELS`. Raises SfumatoError for settings that do not exist.
    """

    order: int = 2
    sigmas: str = "native"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, exponential.LEVELS)
        if self.order not in (1, 2, 3):
            raise SfumatoError(f"DEIS has the orders 1, 2 and 3, not {self.order}.")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> DEIS:
        """As a `scheduler_config.json` says."""
        return cls(
            order=options.get("solver_order", 2),
            sigmas=exponential.levels_option(options),
            lower_order_final=options.get("lower_order_final", True),
        )

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = exponential.levels(schedule, steps, self.sigmas, final="sigma_min")
        last = (2, 1) if self.lower_order_final and steps < 15 else ()
        order = exponential.orders(exponential.lambdas(r), start, self.order, last)
        rule = functools.partial(exponential.moments, space="eps")
        shares = exponential.multistep(r, order, rule, width=self.order, space="eps")
        return ratio_table(t, r[:-1], r[1:], start_row=start, start_sigma=1.0, **shares)

    def init(self, x: Latents) -> State:
        return exponential.blank(x, self.order - 1)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        estimates = (eps, *state)
        return exponential.combine(x, estimates, step), estimates[: self.order - 1]
