"""Normalization over groups of channels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
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

    def mean(values: Float[Array, "B S C"]) -> Float[Array, "B 1 C"]:
        means = values.mean(1).reshape(batch, groups, -1).mean(-1)
        return means.repeat(channels // groups, axis=-1)[:, None]

    y = y - mean(y)
    y = y * (lax.rsqrt(mean(y**2) + epsilon) * scale.astype(y.dtype)) + bias.astype(y.dtype)
    return y.reshape(x.shape).astype(x.dtype)
