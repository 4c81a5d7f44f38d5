"""Normalization over groups of channels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.mesh import divided
from sfumato.models.kernels.packed import packed, unpacked

Moments = tuple[Float[Array, "B *ones C"], Float[Array, "B *ones C"]]
"""Mean and variance of the group of each channel."""

MANY = 2**15
"""Places from which on a picture is large. One of half precision a processor sums up line by line: in one go the
compiler keeps a copy of it in float32, which is the largest array of the autoencoder's last layers."""


def group_norm(
    x: Float[Array, "B *space C"], scale: Float[Array, " C"], bias: Float[Array, " C"], groups: int, epsilon: float
) -> Float[Array, "B *space C"]:
    """Group normalization (arXiv:1803.08494, eq. 1) over space and the channels of a group, in float32 or better."""
    mean, factor = factors(moments(x, groups), scale, epsilon)
    y = x.reshape(len(x), -1, x.shape[-1]).astype(mean.dtype) - mean
    y = y * factor + bias.astype(y.dtype)
    return y.reshape(x.shape).astype(x.dtype)


def moments(x: Float[Array, "B *space C"], groups: int) -> Moments:
    """Mean and variance over space and the channels of a group."""
    large = x.ndim == 4 and x.shape[1] * x.shape[2] >= MANY and not divided()
    return _form(x.dtype, large)(x, groups)


def factors(found: Moments, scale: Float[Array, " C"], epsilon: float) -> Moments:
    """The mean, and what the difference from it is multiplied by."""
    mean, variance = found
    return mean, lax.rsqrt(variance + epsilon) * scale.astype(mean.dtype)


def _form(dtype: jnp.dtype, large: bool) -> Any:
    """How to make the moments of pictures that may be `large`."""
    if dtype.itemsize != 2:
        return _moments
    if jax.default_backend() == "cpu":
        return _on_processor if large else _moments
    return _at_once


def _moments(x: Float[Array, "B *space C"], groups: int) -> Moments:
    y = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = _grouped(y.mean(1), groups)
    return mean, _grouped(((y - mean) ** 2).mean(1), groups)


def _at_once(x: Float[Array, "B *space C"], groups: int) -> Moments:
    """`_moments` in one pass, as the mean of the squares less the square of the mean. What that loses is less than what
    numbers of half precision have lost already: where the mean is so large that it counts."""
    y = x.reshape(x.shape[0], -1, x.shape[-1]).astype(jnp.float32)
    mean, squares = (_grouped(each.mean(1), groups) for each in (y, y * y))
    return mean, jnp.maximum(squares - mean * mean, 0)


def moments_of(x: Float[Array, "B H W D"], groups: int, first: int, count: int) -> Moments:
    """Those of so many channels from the first on, on a processor, where no copy is made of these."""
    if x.dtype.itemsize == 2:
        return _moments_by_line(x, groups, first, count)
    return _moments(x[..., first : first + count], groups)


def _moments_by_line(x: Float[Array, "B H W D"], groups: int, first: int = 0, count: int | None = None) -> Moments:
    lines, wide, count = packed(x), jnp.promote_types(x.dtype, jnp.float32), count or x.shape[3]

    def mean(value: Callable[[Float[Array, "B W C"]], Float[Array, "B W C"]]) -> Float[Array, "B 1 C"]:
        def add(number: Array, total: Float[Array, "B C"]) -> Float[Array, "B C"]:
            line = lax.dynamic_index_in_dim(lines, number, 1, keepdims=False)[..., first : first + count]
            return total + value(unpacked(line, x.dtype).astype(wide)).sum(1)

        total = lax.fori_loop(0, x.shape[1], add, jnp.zeros((x.shape[0], count), wide))
        return _grouped(total / (x.shape[1] * x.shape[2]), groups)

    center = mean(lambda line: line)
    return center, mean(lambda line: (line - center) ** 2)


def _grouped(means: Float[Array, "B C"], groups: int) -> Float[Array, "B 1 C"]:
    """The means of groups, for each of their channels, from those of channels.

    Each mean is taken over space first and then over the channels of a group: in this order the compiler needs no
    second copy of what they are of.
    """
    batch, channels = means.shape
    return means.reshape(batch, groups, -1).mean(-1).repeat(channels // groups, axis=-1)[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _on_processor(x: Float[Array, "B H W C"], groups: int) -> Moments:
    """By line on a processor, with the gradients of `_moments`."""
    by_line, at_once = (functools.partial(form, groups=groups) for form in (_moments_by_line, _moments))
    return lax.platform_dependent(x, cpu=by_line, default=at_once)


def _forward(x: Float[Array, "B H W C"], groups: int) -> tuple[Moments, Array]:
    return _on_processor(x, groups), x


def _backward(groups: int, x: Float[Array, "B H W C"], gradient: Moments) -> tuple[Array]:
    return jax.vjp(functools.partial(_moments, groups=groups), x)[1](gradient)


_on_processor.defvjp(_forward, _backward)
