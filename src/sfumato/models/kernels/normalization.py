"""Normalization over groups of channels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import default_backend, lax
from jaxtyping import Array, Float


def group_norm(
    x: Float[Array, "B *space C"], scale: Float[Array, " C"], bias: Float[Array, " C"], groups: int, epsilon: float
) -> Float[Array, "B *space C"]:
    """Group normalization (arXiv:1803.08494, eq. 1) over space and the channels of a group, in float32 or better.

    Each mean is taken over space first and then over the channels of a group: in this order the compiler needs no
    second copy of `x`, which matters for the gigabytes of the autoencoder's last layers.
    """
    batch, channels = x.shape[0], x.shape[-1]
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(batch, -1, channels)

    def shared(means: Float[Array, "B C"]) -> Float[Array, "B 1 C"]:
        return means.reshape(batch, groups, -1).mean(-1).repeat(channels // groups, axis=-1)[:, None]

    y = y - shared(_sum(y) / y.shape[1])
    y = y * (lax.rsqrt(shared((y**2).mean(1)) + epsilon) * scale.astype(y.dtype)) + bias.astype(y.dtype)
    return y.reshape(x.shape).astype(x.dtype)


def _sum(y: Float[Array, "B S C"]) -> Float[Array, "B C"]:
    """The sums over space. A processor's compiler walks down each column by itself where it finds a sum of what is in
    memory already, and takes four times as long as for a product."""
    if default_backend() != "cpu":
        return y.sum(1)
    return jnp.einsum("bs,bsc->bc", jnp.ones(y.shape[:2], y.dtype), y)
