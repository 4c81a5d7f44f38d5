"""Exponential integrators: the mathematics that DPM-Solver, DEIS and UniPC share.

With lambda = log(alpha / sigma) and h the distance from lambda_s to lambda_t, the probability-flow equation has two
exact solutions (arXiv:2211.01095 and arXiv:2206.00927), one over the clean latents, one over the noise:

    x_t = sigma_t / sigma_s x_s + alpha_t int_0^h e^(u - h) x0(lambda_s + u) du
    x_t = alpha_t / alpha_s x_s - alpha_t sigma_s / alpha_s int_0^h e^(-u) eps(lambda_s + u) du

A solver puts the polynomial through the network's estimates ("nodes") in the place of the unknown function. What is
left of the integral are its moments, those of u^k / k!, and from them a weight for each estimate. All of it is worked
out on the host in float64; a step is then a sum of latents with given coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int

from sfumato.errors import SfumatoError
from sfumato.samplers.base import Latents
from sfumato.samplers.sigmas import KINDS, sigma_schedule
from sfumato.schedule import Schedule, known
from sfumato.types import Step

SPACES = ("x0", "eps")
"""Which of the two solutions: what the polynomial stands for."""
LEVELS = (*KINDS, "lu")
"""Where noise levels come from: as for all samplers, or even steps of lambda with whole timesteps ("lu")."""


def levels(
    schedule: Schedule, steps: int, sigmas: str, *, whole: str = "round", final: str | None = None
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N+1"]]:
    """The timesteps of `steps` evaluations, and their noise ratios followed by the last, as diffusers has them for
    these solvers. `whole` makes whole timesteps for Karras's and Lu's levels; those of the others are cut off."""
    known("noise spacing", sigmas, LEVELS)
    kind = "exponential" if sigmas == "lu" else sigmas
    whole = whole if sigmas in ("karras", "lu") else "floor"
    return sigma_schedule(
        schedule, steps, kind=kind, endpoint=False, rounded=True, span="trained", whole=whole, final=final
    )


def levels_option(options: Mapping[str, Any]) -> str:
    """Which of `LEVELS` a `scheduler_config.json` asks for. Raises SfumatoError if it asks for a variant that is not
    made for latents, or not for this kind of diffusion."""
    for key in ("thresholding", "use_flow_sigmas", "solver_p"):
        if options.get(key):
            raise SfumatoError(f"The scheduler option {key} = {options[key]} is not supported; take another sampler.")
    if (clipped := options.get("lambda_min_clipped")) is not None and clipped > -math.inf:
        raise SfumatoError(f"The scheduler option lambda_min_clipped = {clipped} is not supported (-inf is).")
    named = {"use_lu_lambdas": "lu"} | {f"use_{kind}_sigmas": kind for kind in KINDS}
    return next((kind for key, kind in named.items() if options.get(key)), "native")


def lambdas(r: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """log(alpha / sigma) of noise ratios; where there is no noise, so large a number that e^-lambda is nothing."""
    return -np.log(np.maximum(r, 1e-300))


def orders(
    lam: Float64[np.ndarray, " M"], start: int, order: int, last: Sequence[int] = ()
) -> Int[np.ndarray, " N"]:  # fmt: skip
    """How many estimates each row uses: as many as there are since row `start`, at most `order`, and in the last rows
    at most the numbers in `last`. Where two rows have one lambda, those before are not used."""
    rows = len(lam) - 1
    found, count = np.ones(rows, int), 0
    for i in range(start, rows):
        count = 1 if i == start or lam[i] == lam[i - 1] else min(count + 1, order)
        found[i] = min(count, last[i - rows]) if i >= rows - len(last) else count
    return found


def moments(h: float, count: int, space: str = "x0") -> list[float]:
    """The integrals of e^(u - h) u^k / k! ("x0") or e^(-u) u^k / k! ("eps") from 0 to h, for k < count; by parts, each
    follows from the one before."""
    found = [-math.expm1(-h)]
    for k in range(1, count):
        power = h**k / math.factorial(k)
        found.append(power - found[-1] if space == "x0" else found[-1] - math.exp(-h) * power)
    return found


def weights(nodes: Float64[np.ndarray, " K"], moments: Sequence[float]) -> Float64[np.ndarray, " K"]:
    """What each estimate weighs whose distance from lambda_s is in `nodes`, given the moments of as many powers."""
    powers = np.array([nodes**k / math.factorial(k) for k in range(len(nodes))])
    return np.linalg.solve(powers, np.array(moments))


def carry(r: float, r_next: float, space: str = "x0") -> tuple[float, float]:
    """The factors of x_s and of the integral."""
    alpha, alpha_next = 1 / math.hypot(1, r), 1 / math.hypot(1, r_next)
    share = alpha_next / alpha
    return (share * r_next / r, alpha_next) if space == "x0" else (share, -alpha_next * r)


Rule = Callable[[float, int], Sequence[float]]
"""The moments that a solver takes for a step h, and as many estimates as the number says."""


def multistep(
    r: Float64[np.ndarray, " M"], orders: Int[np.ndarray, " N"], rule: Rule, *, width: int, space: str = "x0"
) -> dict[str, Float64[np.ndarray, " N"]]:
    """The coefficients of `combine` for solvers that look back: `width` estimates, where a row of a lower order gives
    the older ones no weight."""
    lam = lambdas(r)
    columns = np.zeros((1 + width, len(orders)))
    for i, order in enumerate(orders.tolist()):
        columns[0, i], factor = carry(r[i], r[i + 1], space)
        nodes = lam[i - order + 1 : i + 1][::-1] - lam[i]
        columns[1 : 1 + order, i] = factor * weights(nodes, rule(lam[i + 1] - lam[i], order))
    return dict(zip(["x", *(f"m{k}" for k in range(width))], columns, strict=True))


def combine(x: Latents, estimates: Sequence[Latents], step: Step) -> Latents:
    """The latents after a row of `multistep`; `estimates` are the newest first."""
    share = step.coefficients
    return share["x"] * x + sum(share[f"m{k}"] * estimate for k, estimate in enumerate(estimates))


def blank(x: Latents, count: int) -> tuple[Latents, ...]:
    """What is remembered of `count` estimates before there are any."""
    return (jnp.zeros_like(x),) * count
