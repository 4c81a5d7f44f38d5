"""Noise levels for samplers that step in sigma / alpha, as k-diffusion does: how much noise there is to one part of
picture. Here it is called the noise ratio `r`; k-diffusion and diffusers call it sigma. Float64 numpy on the host.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float64

from sfumato.samplers.base import Table, make_table
from sfumato.samplers.options import share
from sfumato.schedule import Schedule, known

KINDS = ("native", "karras", "exponential", "beta")
"""Where the noise levels come from: the model's own timesteps, or a curve between the highest and the lowest."""
WHOLE = ("keep", "round", "floor")

FLOOR = 2.0**-24
"""The least alpha^2, so that the ratio stays finite at zero terminal SNR; diffusers takes the same."""


def sigma_schedule(
    schedule: Schedule, steps: int, *, kind: str = "native", default: str = "linspace", endpoint: bool = True,
    rounded: bool = False, span: str = "visited", whole: str = "keep", final: str | None = None,
) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N+1"]]:  # fmt: skip
    """The timesteps of `steps` evaluations, and their noise ratios followed by the one that the run ends with.

    `default`, `endpoint` and `rounded` go to `Schedule.timesteps`. Other kinds than native run from the highest to
    the lowest noise of these timesteps (`span="visited"`: Euler, Heun, LMS, DPM2) or of all that the model was
    trained with ("trained": DPM-Solver++, DEIS, UniPC); the network is told the timestep whose trained noise is
    nearest, with its fraction (`whole="keep"`), rounded, or cut off ("floor"), as diffusers does by `astype(int64)`.
    `final` ("zero" or "sigma_min") is the schedule's unless it is given.

    So Euler is `sigma_schedule(schedule, steps, kind=kind)`, and DPM-Solver++ is `sigma_schedule(schedule, steps,
    kind=kind, endpoint=False, rounded=True, span="trained", whole="round" if kind == "karras" else "floor")`.

    Raises SfumatoError for an unknown name, and for a number of steps that the schedule does not have.
    """
    known("noise spacing", kind, KINDS)
    known("span", span, ("visited", "trained"))
    known("final sigma type", final := final or schedule.final_sigmas_type, ("zero", "sigma_min"))
    t = schedule.timesteps(steps, default=default, endpoint=endpoint, rounded=rounded)
    r, trained = noise_ratio(schedule, t), trained_ratios(schedule)
    if kind != "native":
        high, low = (r[0], r[-1]) if span == "visited" else (trained[-1], trained[0])
        r = curve(kind, high, low, steps)
        t = timestep_of(schedule, r, whole)
    return t, np.append(r, 0.0 if final == "zero" else trained[0])


def curve(kind: str, high: float, low: float, steps: int) -> Float64[np.ndarray, " N"]:
    """Noise ratios from `high` to `low`, noisiest first; a single one is `high`.

    karras: arXiv:2206.00364, eq. 5 with rho = 7; exponential: even steps of the logarithm; beta: quantiles of
    Beta(0.6, 0.6), close together at both ends (arXiv:2407.12173, eq. 4).
    """
    ramp = np.linspace(0, 1, steps)
    if kind == "karras":
        r = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif kind == "exponential":
        r = np.exp(np.log(high) + ramp * np.log(low / high))
    else:
        from scipy.special import betaincinv  # jax needs scipy anyway; the import takes a while

        r = low + betaincinv(0.6, 0.6, 1 - ramp) * (high - low)
    r[-1], r[0] = low, high  # without rounding errors, as steps of length 0 are looked for
    return r


def trained_ratios(schedule: Schedule) -> Float64[np.ndarray, " T"]:
    """The noise ratio of every training timestep."""
    return noise_ratio(schedule, np.arange(schedule.num_train_timesteps, dtype=np.float64))


def noise_ratio(schedule: Schedule, t: Float64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """sigma / alpha at timesteps that may lie between two trained ones; finite at zero terminal SNR, too."""
    alpha, sigma = schedule.at(t, floor=FLOOR)
    return sigma / alpha


def timestep_of(
    schedule: Schedule, r: Float64[np.ndarray, " N"], whole: str = "keep"
) -> Float64[np.ndarray, " N"]:  # fmt: skip
    """The timesteps of noise ratios, linear in log r between trained ones and held at both ends.

    `whole` makes whole timesteps of them, by "round" or "floor".
    """
    known("rounding of timesteps", whole, WHOLE)
    trained = np.log(trained_ratios(schedule))
    t = np.interp(np.log(np.maximum(r, 1e-10)), trained, np.arange(len(trained)))
    if whole == "floor":
        return np.floor(t + 1e-6)  # a trained ratio may come out as its timestep less a rounding error
    return np.round(t) if whole == "round" else t


def split(r: Float64[np.ndarray, " N"]) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """(alpha, sigma) of noise ratios."""
    return 1 / np.hypot(1, r), r / np.hypot(1, r)


def start_sigma(schedule: Schedule, r: float, default: str = "linspace") -> float:
    """Standard deviation of the first latents for samplers that begin at their first noise ratio: its sigma, or with
    leading spacing 1, since that begins well below the highest noise (diffusers' `init_noise_sigma`)."""
    return 1.0 if (schedule.timestep_spacing or default) == "leading" else float(r / np.hypot(1, r))


def ratio_table(
    t: np.ndarray, r: np.ndarray, r_next: np.ndarray, *, start_row: int = 0, start_sigma: float = 1.0,
    **coefficients: np.ndarray,
) -> Table:  # fmt: skip
    """`make_table` for rows that are given by their noise ratios before and after."""
    return make_table(t, *split(r), *split(r_next), start_row=start_row, start_sigma=start_sigma, **coefficients)


def levels(
    schedule: Schedule, t: Float64[np.ndarray, " N"], clean: bool, floor: float = 0.0
) -> tuple[Float64[np.ndarray, " N+1"], Float64[np.ndarray, " N+1"]]:
    """(alpha, sigma) at timesteps `t`, followed by those of the end: no noise, or if not `clean` training timestep 0.

    For samplers that step in alpha (DDIM and its kin); at zero terminal SNR alpha is 0 exactly, unless `floor`, the
    least alpha^2, is above.
    """
    alpha, sigma = schedule.at(np.append(t, 0.0), floor)
    if clean:
        alpha[-1], sigma[-1] = 1.0, 0.0
    return alpha, sigma


def ancestral(r: np.ndarray, eta: float) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
    """(down, up) for the steps along `r` [N + 1]: the noise ratio to step down to, and the one of the fresh noise on
    top, with down^2 + up^2 = r'^2 (k-diffusion's `get_ancestral_step`).

    Raises SfumatoError for an eta outside of [0, 1].
    """
    here, there = r[:-1], r[1:]
    up = share("eta", eta) * there * np.sqrt(np.maximum(1 - (there / here) ** 2, 0))
    return np.sqrt(there**2 - up**2), up


def interleave(first: Float64[np.ndarray, " N"], second: np.ndarray) -> Float64[np.ndarray, " M"]:
    """[2N - 1]: first[0], second[0], first[1], ..., first[N - 1], the two stages of steps of which the last has one.

    `second` has N - 1 elements, or more that are not used.
    """
    out = np.repeat(first, 2)[:-1]
    out[1::2] = second[: len(first) - 1]
    return out
