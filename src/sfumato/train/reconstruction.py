"""How far a rebuilt picture is from its original: the loss of autoencoders."""

from __future__ import annotations

import dataclasses as dc

import jax.numpy as jnp
from jaxtyping import Array, Float

from sfumato.errors import SfumatoError
from sfumato.models.vae import Gaussian
from sfumato.train.task import Metrics

COLOURS = ((0.4, 0.4, 0.4), (0.5, 0.0, -0.5), (-0.75, 1.5, -0.75))
"""Brightness, red against blue, green against both: in plain RGB an error of one colour among greys costs too little,
and small autoencoders lose the greens."""


@dc.dataclass(frozen=True)
class Reconstruction:
    """The loss of an autoencoder: the sum of the terms below. Raises SfumatoError for negative weights."""

    l1: float = 1.0
    """Weight of the mean absolute difference of pixels."""
    scales: float = 0.5
    """Weight of the same at 1/2, 1/4 and 1/8 of the size, averaged."""
    edges: float = 0.5
    """Weight of the mean absolute difference of the differences between neighbouring pixels."""
    kl: float = 1e-6
    """Weight of the divergence of the latents from the standard normal distribution, in nats a picture."""
    decorrelated: bool = True
    """Compare colours along the axes `COLOURS` instead of red, green and blue."""

    def __post_init__(self) -> None:
        if min(self.l1, self.scales, self.edges, self.kl) < 0:
            raise SfumatoError(f"Weights of a loss are 0 or more, and here one is negative: {self}.")

    def __call__(
        self, rebuilt: Float[Array, "B H W 3"], pixels: Float[Array, "B H W 3"], posterior: Gaussian
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of pictures in [-1, 1], rebuilt from latents of the distribution `posterior`, and each of its terms.

        "psnr" is the peak signal-to-noise ratio of the whole batch, in dB.
        """
        off = rebuilt - pixels
        mse = jnp.square(off).mean()
        if self.decorrelated:
            off = off @ jnp.array(COLOURS, jnp.float32).T
        terms = {
            "l1": jnp.abs(off).mean(),
            "scales": jnp.stack([jnp.abs(pooled(off, size)).mean() for size in (2, 4, 8)]).mean(),
            "edges": (jnp.abs(jnp.diff(off, axis=1)).mean() + jnp.abs(jnp.diff(off, axis=2)).mean()) / 2,
            "kl": posterior.kl().mean(),
        }
        loss = sum(getattr(self, name) * value for name, value in terms.items())
        return jnp.asarray(loss), terms | {"psnr": 10 * jnp.log10(4 / mse)}


def pooled(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Means of squares of `size` pixels; what is left over at the ends is left out."""
    batch, height, width, channels = x.shape
    x = x[:, : height - height % size, : width - width % size]
    return x.reshape(batch, height // size, size, width // size, size, channels).mean((2, 4))
