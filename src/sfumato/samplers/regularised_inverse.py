"""DDIM inversion that keeps the predicted noise close to white Gaussian noise. arXiv:2302.03027, section 3.1."""

from __future__ import annotations

import dataclasses as dc
import functools
from typing import final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from sfumato.errors import SfumatoError
from sfumato.samplers.base import Latents, Sampler, State, Table
from sfumato.samplers.ddim_inverse import DDIMInverse
from sfumato.schedule import Schedule
from sfumato.types import Step

SMALLEST = 8
"""Noise of this size, in latents, is the top of the pyramid."""


@final
@dc.dataclass(frozen=True)
class RegularisedInverse(Sampler):
    """`DDIMInverse`, where eps moves by -lambda dL/deps before the step is taken: `iterations` times along the
    autocorrelation, `rolls` times for as many random offsets, and then along the divergence from N(0, 1).

    L_pair is the sum over channels and levels of a pyramid (each the 2x2 means of the one before, down to 8x8) of
    mean(eps roll(eps, d))^2 for one offset d down and across. L_KL = var + mean^2 - 1 - log(var) of all of a picture's
    numbers, twice the divergence.

    As in the authors' code, and in torch's, d is drawn anew every time instead of summed over, smaller than half the
    height; the pyramid's levels are not multiplied by 2, which the paper says; and the numbers here are theirs. Where
    latents are not square the smaller side counts, and all pictures have the same offsets but each a divergence of its
    own. eps is regularised itself: torch takes the gradient with respect to the network's output, which for one that
    predicts v is alpha^2 times this, at the wrong end of the step.
    """

    iterations: int = 5
    rolls: int = 5
    autocorrelation: float = dc.field(default=20.0, compare=False)
    """lambda of L_pair / rolls."""
    divergence: float = dc.field(default=20.0, compare=False)
    """lambda of L_KL."""
    seed: int = dc.field(default=0, compare=False)
    """Of the offsets."""
    shape: tuple[int, int, int] = (64, 64, 4)
    """Height, width and channels of a picture's latents; `sfumato.invert` fills it in."""

    def table(self, schedule: Schedule, steps: int, start: int = 0) -> Table:
        """As that of DDIMInverse, with the offsets. Raises SfumatoError also for less than no iterations or rolls."""
        if self.iterations < 0 or self.rolls < 0:
            raise SfumatoError(f"Regularisation takes {self.iterations} iterations of {self.rolls} rolls; 0 is none.")
        plain = DDIMInverse().table(schedule, steps, start)
        columns = {
            **plain.steps.coefficients, "offsets": self.offsets(steps),
            "autocorrelation": np.full(steps, self.autocorrelation / max(self.rolls, 1)),
            "divergence": np.full(steps, self.divergence),
        }  # fmt: skip
        return dc.replace(plain, steps=dc.replace(plain.steps, coefficients=columns))

    def offsets(self, steps: int) -> Float64[np.ndarray, "N iterations rolls C levels"]:
        """Random whole numbers, each from 0 to less than half the smaller side of its level."""
        sides = [side := min(self.shape[:2])]
        while side > SMALLEST:
            sides.append(side := side // 2)
        shape = (steps, self.iterations, self.rolls, self.shape[2], len(sides))
        halves = np.maximum(np.array(sides) // 2, 1)
        return np.floor(np.random.default_rng(self.seed).random(shape) * halves)

    def step(self, x: Latents, x0: Latents, eps: Latents, step: Step, state: State) -> tuple[Latents, State]:
        c = step.coefficients

        def iteration(eps: Latents, offsets: Float[Array, "rolls C levels"]) -> tuple[Latents, None]:
            eps, _ = jax.lax.scan(roll, eps, offsets)
            return eps - c["divergence"] * jax.grad(divergence)(eps), None

        def roll(eps: Latents, offsets: Float[Array, "C levels"]) -> tuple[Latents, None]:
            return eps - c["autocorrelation"] * jax.grad(autocorrelation)(eps, offsets), None

        eps, _ = jax.lax.scan(iteration, eps, c["offsets"])
        return DDIMInverse().step(x, (x - step.sigma * eps) / step.alpha, eps, step, state)


def autocorrelation(eps: Latents, offsets: Float[Array, "C levels"]) -> Float[Array, ""]:
    """L_pair, summed over pictures."""
    total = jnp.zeros((), eps.dtype)
    for level in range(offsets.shape[1]):
        eps = eps if level == 0 else halved(eps)
        for axis in (1, 2):
            roll = jax.vmap(functools.partial(jnp.roll, axis=axis), (3, 0), 3)
            total += ((eps * roll(eps, offsets[:, level].astype(int))).mean((1, 2)) ** 2).sum()
    return total


def divergence(eps: Latents) -> Float[Array, ""]:
    """L_KL, summed over pictures."""
    mean, variance = eps.mean((1, 2, 3)), eps.var((1, 2, 3), ddof=1)
    return (variance + mean**2 - 1 - jnp.log(variance + 1e-7)).sum()


def halved(x: Latents) -> Float[Array, "B h w C"]:
    """The means of 2x2 latents; an odd row or column at the end is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
