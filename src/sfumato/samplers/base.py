"""What a sampler is: a table worked out on the host, and a step that is linear algebra on latents."""

from __future__ import annotations

import abc
import dataclasses as dc
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float

from sfumato.schedule import Schedule
from sfumato.types import Step

Latents = Float[Array, "B H W C"]
State = Any
"""What a sampler remembers between rows: a pytree, such as the last estimates of x0."""


@dc.dataclass(frozen=True)
class Table:
    """The rows of one run, and how it starts."""

    steps: Step
    """Numpy arrays [N], float64 but for the integer `index` and boolean `active`; `noise` is None."""
    start_sigma: float = 1.0
    """Standard deviation of the latents that a run from pure noise starts with: 1, or the first row's sigma."""


@dc.dataclass(frozen=True)
class Sampler(abc.ABC):
    """A way from noise to a picture in a number of evaluations of the network.

    Latents are always x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1, also in samplers whose papers write
    x / alpha: those convert inside `step`. A sampler is static, so its settings are part of the compiled program; all
    numbers that follow from them and from the schedule are in the table, which is data.
    """

    stochastic: ClassVar[bool] = False
    """Whether `step` uses `step.noise`, one draw a row."""

    @abc.abstractmethod
    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """The rows for `steps` steps. Those of steps before number `start` are inactive, and samplers that look back
        begin anew there. Raises SfumatoError for a number of steps that the schedule does not have."""

    def init(self, x: Latents) -> State:
        """What is remembered before the first active row."""
        return ()

    @abc.abstractmethod
    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        """The latents after this row, and what is remembered.

        `x0` and `eps` are the network's guided estimates of the clean latents and of the noise in `x`.
        """


def make_table(
    t: np.ndarray, alpha: np.ndarray, sigma: np.ndarray, alpha_next: np.ndarray, sigma_next: np.ndarray, *,
    start_row: int = 0, start_sigma: float = 1.0, **coefficients: np.ndarray,
) -> Table:  # fmt: skip
    """A table from its columns [N]; rows before `start_row` are inactive and progress counts from there."""
    index = np.arange(len(t))
    progress = np.maximum(index - start_row, 0) / max(len(t) - start_row, 1)
    columns = {key: np.asarray(value, np.float64) for key, value in coefficients.items()}
    active, last = index >= start_row, index == len(t) - 1
    return Table(Step(index, progress, active, last, t, alpha, sigma, alpha_next, sigma_next, columns), start_sigma)
