"""The objective of diffusion: noised latents, what the network should say of them, and how much each time counts.

x_t = alpha x0 + sigma eps, and the loss is the mean square of the network's error (arXiv:2006.11239, eq. 14), with
weights by time. What is random is drawn first (`Draws`) and everything else is a function of it.
"""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from sfumato.errors import SfumatoError
from sfumato.schedule import Schedule, to_eps, to_output, to_x0
from sfumato.types import pytree


@pytree
class Draws:
    """All that is random in a step."""

    noise: Float[Array, "B h w C"]
    """What the latents are mixed with; offset noise is in it already."""
    t: Int[Array, " B"]
    """Training timesteps."""
    posterior: Float[Array, "B h w C"]
    """Standard normal noise that picks latents out of the autoencoder's distribution."""
    dropped: Bool[Array, " B"]
    """Rows that go without their caption, so that the model learns what guidance starts from (arXiv:2207.12598)."""
    dropped_image: Bool[Array, " B"]
    """Rows that go without their conditioning picture (InstructPix2Pix)."""


@dc.dataclass(frozen=True)
class Objective:
    """What is minimised. Raises SfumatoError for settings out of range.

    The network's target (noise, velocity, clean latents) is the schedule's `prediction_type`.
    """

    schedule: Schedule
    min_snr: float | None = None
    """gamma of min-SNR weighting (arXiv:2303.09556); 5 is usual. None weighs all times alike."""
    snr_floor: float = 0.0
    """Added to the SNR of min-SNR weights. Those vanish with the SNR, so hardly anything is learnt where all is noise
    and only the text tells what to draw; with 1 the noisiest times of a velocity have the weight 1."""
    offset: float = 0.0
    """Offset noise: the deviation of a number that is added to all noise of a channel of a picture
    (https://www.crosslabs.org/blog/diffusion-with-offset-noise); 0.1 is usual."""
    dropout: float = 0.0
    """The share of rows that go without their caption alone."""
    image_dropout: float = 0.0
    """The share of rows that go without their conditioning picture alone."""
    joint_dropout: float = 0.0
    """The share of rows that go without both."""
    stratified: bool = False
    """Spread the timesteps of a batch evenly: less noise in the loss, the same mean."""

    def __post_init__(self) -> None:
        shares = (self.dropout, self.image_dropout, self.joint_dropout)
        if min(shares) < 0 or sum(shares) > 1:
            raise SfumatoError(f"Shares of dropped rows lie between 0 and 1 in all, not {shares}.")
        if self.min_snr is not None and not self.min_snr > 0:
            raise SfumatoError(f"min_snr must be above 0 (5 is usual), not {self.min_snr!r}.")
        if not self.snr_floor >= 0 or (self.snr_floor and (self.min_snr is None or self.min_snr <= self.snr_floor)):
            raise SfumatoError(f"snr_floor is 0 or more and below min_snr, which it goes with; not {self.snr_floor!r}.")
        if self.snr_floor and self.schedule.prediction_type == "epsilon":
            raise SfumatoError(
                "snr_floor is for models that tell the velocity or the sample; this one tells the noise."
            )
        if not self.offset >= 0:
            raise SfumatoError(f"offset must be 0 or more (0.1 is usual), not {self.offset!r}.")

    def draw(self, key: jax.Array, shape: tuple[int, int, int, int]) -> Draws:
        """What is random for latents of `shape` [B h w C]."""
        keys, rows = jax.random.split(key, 5), shape[0]
        noise = jax.random.normal(keys[0], shape)
        if self.offset:
            noise += self.offset * jax.random.normal(keys[1], (rows, 1, 1, shape[-1]))
        chance = jax.random.uniform(keys[3], (rows,))
        text, both = self.dropout, self.dropout + self.joint_dropout
        return Draws(
            noise, self.times(keys[2], rows), jax.random.normal(keys[4], shape),
            chance < both, (chance >= text) & (chance < both + self.image_dropout),
        )  # fmt: skip

    def times(self, key: jax.Array, rows: int) -> Int[Array, " B"]:
        """Timesteps, each as likely as any other."""
        count = self.schedule.num_train_timesteps
        if not self.stratified:
            return jax.random.randint(key, (rows,), 0, count)
        order, inside = jax.random.split(key)
        places = (jax.random.permutation(order, rows) + jax.random.uniform(inside, (rows,))) / rows
        return jnp.minimum((places * count).astype(jnp.int32), count - 1)

    def noised(self, latents: Float[Array, "B h w C"], draws: Draws) -> Float[Array, "B h w C"]:
        """x_t, what the network is shown."""
        alpha, sigma = self._shares(draws.t)
        return alpha * latents + sigma * draws.noise

    def target(self, latents: Float[Array, "B h w C"], draws: Draws) -> Float[Array, "B h w C"]:
        """What the network should say of x_t."""
        return to_output(latents, draws.noise, *self._shares(draws.t), self.schedule.prediction_type)

    def clean(
        self, output: Float[Array, "B h w C"], noisy: Float[Array, "B h w C"], draws: Draws
    ) -> Float[Array, "B h w C"]:
        """The clean latents that the network's output on x_t stands for."""
        return to_x0(output, noisy, *self._shares(draws.t), self.schedule.prediction_type)

    def onward(
        self, output: Float[Array, "B h w C"], noisy: Float[Array, "B h w C"], draws: Draws
    ) -> tuple[Draws, Float[Array, "B h w C"]]:
        """Where the network itself goes from x_t in one step of DDIM to half the time, without a gradient: draws with
        that time and the noise that it sees, and the latents there."""
        noise = to_eps(output, noisy, *self._shares(draws.t), self.schedule.prediction_type)
        there = dc.replace(draws, t=draws.t // 2, noise=noise)
        return jax.lax.stop_gradient((there, self.noised(self.clean(output, noisy, draws), there)))

    def loss(
        self, output: Float[Array, "B h w C"], latents: Float[Array, "B h w C"], draws: Draws,
        weights: Float[Array, " B"] | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:  # fmt: skip
        """The mean over the batch of the weighted mean square error, and the unweighted one as "mse".

        `weights` are further weights of the rows, such as those of prior preservation.
        """
        rows = jnp.square(output - self.target(latents, draws)).mean((1, 2, 3))
        weighted = rows * jnp.asarray(self.weights, jnp.float32)[draws.t]
        return (weighted if weights is None else weighted * weights).mean(), {"mse": rows.mean()}

    @property
    def weights(self) -> Float64[np.ndarray, " T"]:
        """The weight of each timestep (arXiv:2303.09556, section 3.4).

        In terms of the clean latents it is min(SNR + snr_floor, gamma) with SNR = alpha^2 / sigma^2. An error of the
        noise is one of the clean latents times SNR^(1/2), one of the velocity times (SNR + 1)^(1/2), so these are
        divided by it.
        """
        schedule = self.schedule
        if self.min_snr is None:
            return np.ones(schedule.num_train_timesteps)
        with np.errstate(divide="ignore"):
            snr = schedule.alphas**2 / schedule.sigmas**2
            # Divided before the minimum is taken: at zero terminal SNR it would be 0 / 0.
            if schedule.prediction_type == "epsilon":
                return np.minimum(1.0, self.min_snr / snr)
        return np.minimum(snr + self.snr_floor, self.min_snr) / (
            snr + 1 if schedule.prediction_type == "v_prediction" else 1
        )

    def _shares(self, t: Int[Array, " B"]) -> tuple[Float[Array, "B 1 1 1"], Float[Array, "B 1 1 1"]]:
        """alpha and sigma."""
        alpha, sigma = (jnp.asarray(a, jnp.float32)[t][:, None, None, None] for a in
                        (self.schedule.alphas, self.schedule.sigmas))  # fmt: skip
        return alpha, sigma
