"""Normalization over groups of channels."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import default_backend, lax
from jaxtyping import Array, Float

Saved = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: Float[Array, "B *space C"], scale: Float[Array, " C"], bias: Float[Array, " C"], groups: int, epsilon: float
) -> Float[Array, "B *space C"]:
    """Group normalization (arXiv:1803.08494, eq. 1) over space and the channels of a group, in float32 or better.

    Each mean is taken over space first and then over the channels of a group: in this order the compiler needs no
    second copy of `x`, which matters for the gigabytes of the autoencoder's last layers. All gradients are made of two
    sums over space; those that jax derives pass over the picture several times more.
    """
    return _forward(x, scale, bias, groups, epsilon)[0]


def _forward(x: Array, scale: Array, bias: Array, groups: int, epsilon: float) -> tuple[Array, Saved]:
    """The result, and for `_backward` what lies around the mean, its rate, scale and bias."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(x.shape[0], -1, x.shape[-1])
    y = y - _shared(_total(y) / y.shape[1], groups)
    rate = lax.rsqrt(_shared((y**2).mean(1), groups) + epsilon)
    out = y * (rate * scale.astype(y.dtype)) + bias.astype(y.dtype)
    return out.reshape(x.shape).astype(x.dtype), (y, rate, scale, bias)


def _backward(groups: int, epsilon: float, saved: Saved, gradient: Array) -> tuple[Array, Array, Array]:
    """The gradients by x, scale and bias.

    With y around the mean and r its rate, x_i moves the mean of its group and r, too: what comes out is
    r (s g - mean(s g) - y r^2 mean(s g y)), where s is the scale and g the gradient by the result.
    """
    y, rate, scale, bias = saved
    g, wide = gradient.astype(y.dtype).reshape(y.shape), scale.astype(y.dtype)
    plain, along = _total(g), _total(g * y)
    means, slopes = (_shared(sums * wide / y.shape[1], groups) for sums in (plain, along))
    by_x = (g * wide - means - y * (rate**2 * slopes)) * rate
    by_scale, by_bias = _total((along * rate[:, 0])[None])[0], _total(plain[None])[0]
    return by_x.reshape(gradient.shape).astype(gradient.dtype), by_scale.astype(scale.dtype), by_bias.astype(bias.dtype)


def _total(y: Float[Array, "B S C"]) -> Float[Array, "B C"]:
    """The sums over space. A processor's compiler would sum a middle axis up by steps of a row, or, asked for further
    sums of them, begin anew for each: as a product it is done once, and several times as fast."""
    if default_backend() != "cpu":
        return y.sum(1)
    return jnp.einsum("bs,bsc->bc", jnp.ones(y.shape[:2], y.dtype), y)


def _shared(means: Float[Array, "B C"], groups: int) -> Float[Array, "B 1 C"]:
    """For each channel the mean over those of its group."""
    of_groups = means.reshape(len(means), groups, -1).mean(-1)
    return of_groups.repeat(means.shape[1] // groups, axis=-1)[:, None]


group_norm.defvjp(_forward, _backward)
