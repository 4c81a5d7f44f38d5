"""Linear multistep (Adams-Bashforth on uneven steps) in the noise ratio r = sigma / alpha."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any, final

import jax.numpy as jnp
import numpy as np
from numpy.polynomial import Polynomial

from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.options import kind_of
from sfumato.samplers.sigmas import KINDS, ratio_table, sigma_schedule, start_sigma
from sfumato.schedule import Schedule, known
from sfumato.types import Step

ORDER = 4


@final
@dc.dataclass(frozen=True)
class LMS(Sampler):
    """d(x / alpha) / dr = eps, with eps between r and r' from the polynomial through its last four values
    (k-diffusion's `sample_lms`).

    From step `start` on the order grows anew from 1; diffusers takes the weights of a run with a history that it does
    not have. The polynomials are integrated exactly.
    """

    sigmas: str = "native"

    def __post_init__(self) -> None:
        known("noise spacing", self.sigmas, KINDS)

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> LMS:
        """As a `scheduler_config.json` says."""
        return cls(kind_of(options))

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """`steps` rows."""
        t, r = sigma_schedule(schedule, steps, kind=self.sigmas, final="zero")
        alpha_next = 1 / np.hypot(1, r[1:])
        weights = np.array([padded_weights(r, row, start) for row in range(steps)])
        weights[:, 0] += r[:-1]  # x / alpha = x0 + r eps
        return ratio_table(
            t, r[:-1], r[1:], start_row=start, start_sigma=start_sigma(schedule, r[0]),
            **{f"w{k}": alpha_next * weights[:, k] for k in range(ORDER)},
        )  # fmt: skip

    def init(self, x: Latents) -> State:
        """The last three eps, newest first."""
        return (jnp.zeros_like(x),) * (ORDER - 1)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        known = (eps, *state)
        slope = sum(step.coefficients[f"w{k}"] * each for k, each in enumerate(known))
        return step.alpha_next * x0 + slope, known[:-1]


def padded_weights(r: np.ndarray, row: int, start: int) -> np.ndarray:
    """[ORDER] what the eps at `r[row]`, `r[row - 1]`, ... since row `start` contribute on the way to `r[row + 1]`."""
    nodes = r[max(row - ORDER + 1, min(start, row)) : row + 1][::-1]
    return np.pad(lagrange_integrals(nodes, r[row], r[row + 1]), (0, ORDER - len(nodes)))


def lagrange_integrals(nodes: np.ndarray, low: float, high: float) -> np.ndarray:
    """The integrals from `low` to `high` of the polynomials that are 1 at one node and 0 at the others."""

    def integral(node: float, others: np.ndarray) -> float:
        # Measured from `low` in units of the way, since powers of large numbers would drown the digits.
        basis = Polynomial.fromroots((others - low) / (high - low)) if len(others) else Polynomial([1.0])
        return (high - low) * basis.integ()(1.0) / basis((node - low) / (high - low))

    return np.array([integral(node, np.delete(nodes, k)) for k, node in enumerate(nodes)])
