"""How much noise each training timestep holds, which timesteps to visit, and what a network's output means.

A noised picture is x = alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 (arXiv:2006.11239, eq. 4). Tables are
float64 numpy on the host; the conversions are pure functions of jax arrays.
"""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from sfumato.errors import SfumatoError

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("scaled_linear", "linear", "squaredcos_cap_v2")

SILENCE: Mapping[str, Any] = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
"""What a `scheduler_config.json` means where it says nothing."""
SILENCE_OF: Mapping[str, Mapping[str, Any]] = {
    name: values
    for names, values in (
        ("DDIM DDIMInverse DDPM", {"clip_sample": True}),
        ("PNDM", {"set_alpha_to_one": False}),
        ("LCM TCD", {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}),
        ("HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DPMSolverSDE", {"beta_start": 0.00085, "beta_end": 0.012}),
    )
    for name in names.split()
}
"""The same where a scheduler (its diffusers name without "Scheduler") has other defaults; diffusers 0.42."""


@jax.tree_util.register_static
@dc.dataclass(frozen=True)
class Schedule:
    """The noise schedule of a model, in the terms of diffusers' `scheduler_config.json`.

    Raises SfumatoError for an unknown beta schedule, prediction type or spacing.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: str = "epsilon"
    timestep_spacing: str | None = None
    """None leaves the choice to the sampler."""
    steps_offset: int = 0
    """Added to the timesteps of leading spacing."""
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    """For samplers that step in alpha (DDIM, PNDM): end without noise, or else at training timestep 0."""
    final_sigmas_type: str = "zero"
    """The same for samplers that step in sigma (Euler, DPM-Solver): "zero" or "sigma_min"."""
    class_name: str = "DDIMScheduler"
    """diffusers' name of the sampler that the checkpoint asks for."""
    options: Mapping[str, Any] = dc.field(default_factory=dict, hash=False)
    """The rest of the configuration, for samplers to look into."""

    def __post_init__(self) -> None:
        known("beta schedule", self.beta_schedule, BETA_SCHEDULES)
        known("prediction type", self.prediction_type, PREDICTIONS)
        known("timestep spacing", self.timestep_spacing or "leading", SPACINGS)
        known("final sigma type", self.final_sigmas_type, ("zero", "sigma_min"))
        if self.num_train_timesteps < 1 or len(self.trained_betas or ()) not in (0, self.num_train_timesteps):
            betas = f" from {len(self.trained_betas)} trained betas" if self.trained_betas else ""
            raise SfumatoError(f"A schedule of {self.num_train_timesteps} timesteps cannot be made{betas}.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Schedule:
        """From a `scheduler_config.json`; what it leaves out means what it means to diffusers.

        Raises SfumatoError for the schedulers of other kinds of diffusion, too.
        """
        name = config.get("_class_name") or cls.class_name
        if name.startswith(("FlowMatch", "EDM")):
            raise SfumatoError(
                f"{name} is not made of betas, as the schedules of SD 1.x, 2.x and XL are"
                " (DDIMScheduler, EulerDiscreteScheduler and their like)."
            )
        fields = {field.name for field in dc.fields(cls)} - {"class_name", "options"}
        given = {**SILENCE, **SILENCE_OF.get(name.removesuffix("Scheduler"), {}), **config}
        values = {key: given[key] for key in fields & given.keys() if given[key] is not None}
        if "trained_betas" in values:
            values["trained_betas"] = tuple(float(beta) for beta in values["trained_betas"])
        rest = {key: value for key, value in config.items() if key not in fields | {"_class_name"}}
        return cls(**values, class_name=name, options=rest)

    def to_config(self) -> dict[str, Any]:
        """A `scheduler_config.json` that diffusers reads, and that `from_config` reads back to the same."""
        values = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        options = values.pop("options")
        if self.timestep_spacing is None:
            del values["timestep_spacing"]
        if self.trained_betas is not None:
            values["trained_betas"] = list(self.trained_betas)
        return {"_class_name": values.pop("class_name"), **options, **values}

    @functools.cached_property
    def alphas(self) -> Float64[np.ndarray, " T"]:
        """sqrt(prod(1 - beta)): the share of the picture at each training timestep, exactly 0 at the end of a
        schedule rescaled to zero terminal SNR (arXiv:2305.08891, algorithm 1)."""
        alphas = np.sqrt(np.cumprod(1 - self.raw_betas()))
        if self.rescale_betas_zero_snr:
            alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
        return alphas

    @functools.cached_property
    def sigmas(self) -> Float64[np.ndarray, " T"]:
        """sqrt(1 - alpha^2): the share of noise. (What k-diffusion calls sigma is this divided by alpha.)"""
        return np.sqrt(1 - self.alphas**2)

    @functools.cached_property
    def betas(self) -> Float64[np.ndarray, " T"]:
        """The variance of the noise that each training timestep adds, after any rescaling."""
        squares = self.alphas**2
        return 1 - squares / np.concatenate([[1.0], squares[:-1]])

    def raw_betas(self) -> Float64[np.ndarray, " T"]:
        """The betas before any rescaling to zero terminal SNR."""
        if self.trained_betas is not None:
            return np.array(self.trained_betas, np.float64)
        count = self.num_train_timesteps
        if self.beta_schedule == "squaredcos_cap_v2":  # arXiv:2102.09672, eq. 17
            bar = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * np.pi / 2) ** 2
            return np.minimum(1 - bar[1:] / bar[:-1], 0.999)
        power = 2 if self.beta_schedule == "scaled_linear" else 1
        return np.linspace(self.beta_start ** (1 / power), self.beta_end ** (1 / power), count) ** power

    def at(
        self, t: Float64[np.ndarray, " N"], floor: float = 0.0
    ) -> tuple[Float64[np.ndarray, " N"], Float64[np.ndarray, " N"]]:
        """(alpha, sigma) at timesteps that may lie between two trained ones; sigma / alpha is linear there.

        `floor` is the least alpha^2. Samplers that step in sigma / alpha need one above 0 for zero terminal
        SNR; diffusers takes 2**-24 for them.
        """
        low = np.floor(t).astype(int)
        high, weight = np.minimum(low + 1, self.num_train_timesteps - 1), t - low
        alphas = np.sqrt(np.maximum(self.alphas**2, floor))
        sigmas = np.sqrt(1 - alphas**2)
        # (1-w) s0/a0 + w s1/a1, times a0 a1 so that a1 = 0 does no harm.
        alpha = alphas[low] * alphas[high]
        sigma = (1 - weight) * sigmas[low] * alphas[high] + weight * sigmas[high] * alphas[low]
        alpha, sigma = np.where(weight > 0, (alpha, sigma), (alphas[low], sigmas[low]))
        return alpha / np.hypot(alpha, sigma), sigma / np.hypot(alpha, sigma)

    def timesteps(
        self, steps: int, *, default: str = "leading", endpoint: bool = True, rounded: bool = True
    ) -> Float64[np.ndarray, " N"]:
        """The training timesteps to visit, noisiest first (arXiv:2305.08891, table 2).

        `default` is the spacing where the configuration names none. Samplers differ in two more ways:
        `endpoint=False` spreads one point more and leaves out the clean end (DPM-Solver, UniPC; trailing
        spacing has no such point), and `rounded=False` keeps the fractions of linspace (Euler, Heun, LMS).

        Raises SfumatoError for less than one step, or more than the model was trained with.
        """
        trained = self.num_train_timesteps
        if steps < 1:
            raise SfumatoError(f"Sampling takes at least 1 step, not {steps}.")
        if steps > trained:
            raise SfumatoError(f"The model was trained with {trained} timesteps, too few for {steps} steps.")
        spacing = self.timestep_spacing or default
        known("timestep spacing", spacing, SPACINGS)
        points = steps if endpoint else steps + 1
        if spacing == "trailing":  # rounding errors can make `arange` one longer
            return np.round(np.arange(trained, 0, -trained / steps))[:steps] - 1
        if spacing == "linspace":
            times = np.linspace(0, trained - 1, points)
            return (np.round(times) if rounded else times)[::-1][:steps]
        times = np.arange(points)[::-1][:steps] * float(trained // points) + self.steps_offset
        if times[0] > trained - 1:
            raise SfumatoError(
                f"{steps} steps with a steps_offset of {self.steps_offset} would start at"
                f" {times[0]:.0f}, beyond the last timestep {trained - 1}; take fewer steps."
            )
        return times


def to_eps(
    output: Float[Array, "*x"],
    x: Float[Array, "*x"],
    alpha: Float[Array, "*#x"] | float,
    sigma: Float[Array, "*#x"] | float,
    prediction: str,
) -> Float[Array, "*x"]:
    """The noise in x = alpha x0 + sigma eps, from a network's output.

    v = alpha eps - sigma x0 (arXiv:2202.00512, appendix D). `alpha` and `sigma` are numbers, or arrays that
    broadcast to `x`. Raises SfumatoError for an unknown prediction type.
    """
    known("prediction type", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return output
    if prediction == "v_prediction":
        return sigma * x + alpha * output
    return ratio(x - alpha * output, sigma)


def to_x0(
    output: Float[Array, "*x"],
    x: Float[Array, "*x"],
    alpha: Float[Array, "*#x"] | float,
    sigma: Float[Array, "*#x"] | float,
    prediction: str,
) -> Float[Array, "*x"]:
    """The clean latents, as `to_eps`. Where alpha = 0 (zero terminal SNR) v gives them exactly; eps then says
    nothing about them, and the answer is 0, the mean of all latents."""
    known("prediction type", prediction, PREDICTIONS)
    if prediction == "sample":
        return output
    if prediction == "v_prediction":
        return alpha * x - sigma * output
    return ratio(x - sigma * output, alpha)


def to_output(
    x0: Float[Array, "*x"],
    eps: Float[Array, "*x"],
    alpha: Float[Array, "*#x"] | float,
    sigma: Float[Array, "*#x"] | float,
    prediction: str,
) -> Float[Array, "*x"]:
    """What a network should put out for x = alpha x0 + sigma eps: the way back from `to_x0` and `to_eps`."""
    known("prediction type", prediction, PREDICTIONS)
    if prediction == "epsilon":
        return eps
    return x0 if prediction == "sample" else alpha * eps - sigma * x0


def to_v(
    output: Float[Array, "*x"],
    x: Float[Array, "*x"],
    alpha: Float[Array, "*#x"] | float,
    sigma: Float[Array, "*#x"] | float,
    prediction: str,
) -> Float[Array, "*x"]:
    """The velocity, as `to_eps`. Where alpha = 0 it is -x0, of which eps says nothing: the answer is 0."""
    known("prediction type", prediction, PREDICTIONS)
    if prediction == "v_prediction":
        return output
    if prediction == "epsilon":  # alpha eps - sigma (x - sigma eps) / alpha, with alpha^2 + sigma^2 = 1
        return ratio(output - sigma * x, alpha)
    return ratio(alpha * x - output, sigma)


def ratio(a: Float[Array, "*x"], b: Float[Array, "*#x"] | float) -> Float[Array, "*x"]:
    """a / b, and 0 where b = 0, with gradients that are finite there as well."""
    b = jnp.asarray(b, a.dtype) if isinstance(b, float) else b
    return jnp.where(b == 0, jnp.zeros_like(a), a / jnp.where(b == 0, 1, b))


def known(what: str, name: str, names: tuple[str, ...]) -> None:
    """Raises SfumatoError unless `name` is one of `names`."""
    if name not in names:
        raise SfumatoError(f"Unknown {what} {name!r}; known are {', '.join(names)}.")
