"""The autoencoder between pictures and latents (arXiv:2112.10752, section 3.1), trained on pictures alone."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sfumato.errors import SfumatoError
from sfumato.io.load import default_dtype
from sfumato.io.save import save
from sfumato.model import Model
from sfumato.train.denoising import with_networks
from sfumato.train.task import Batch, Metrics, Task, cast, checkpointed, fresh, masters

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
        self, vae: Any, pixels: Float[Array, "B H W 3"], noise: Float[Array, "B h w Z"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of pictures in [-1, 1] whose latents `noise` picks, and each of its terms."""
        posterior = vae.posterior(pixels)
        off = vae.decode(vae.scale(posterior.sample(noise))) - pixels
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


def autoencoder(
    model: Model, reconstruction: Reconstruction | None = None, *, scratch: bool = False, seed: int = 0,
    dtype: str | None = None, remat: bool = False,
) -> Task:  # fmt: skip
    """Trains the autoencoder of `model`, or with `scratch` a new one of the same configuration out of `seed`.

    `dtype` is what is computed in, `remat` gradient checkpointing. Exports the whole model. A UNet that was trained
    before does not know the new latents.
    """
    reconstruction, compute = reconstruction or Reconstruction(), dtype or default_dtype()
    start: nnx.Module = fresh(model.vae, seed) if scratch else model.vae

    def loss(trained: Any, frozen: Any, batch: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        vae, pixels = cast(trained["vae"], compute), jnp.asarray(batch["pixels"])
        rows, height, width, _ = pixels.shape
        shape = (rows, height // vae.factor, width // vae.factor, vae.config.latent_channels)
        return reconstruction(vae, pixels, jax.random.normal(key, shape))

    def export(trained: Any, folder: Path) -> None:
        save(with_networks(model, trained), folder)

    return Task(
        {"vae": checkpointed(masters(start), remat)},
        {},
        loss,
        lambda batch: {"pixels": np.asarray(batch["pixels"], np.float32)},
        export,
    )
