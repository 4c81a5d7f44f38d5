"""What is computed when."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Shaped


def after(x: Float[Array, "*space"], weights: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`weights`, but only once `x` is there.

    What is made of weights alone depends on no data. Left to itself the compiler makes it of those of all layers before
    the first is needed, and before a loop that needs it again, so that all of it is in memory at once.
    `jax.lax.optimization_barrier` says the same, but the CPU compiler drops it; this it cannot see through: what is
    added is zero for every number (and for NaN).
    """
    first = x[(0,) * x.ndim]
    return weights + ((first < 0) & (first > 0)).astype(weights.dtype)


def once(x: Float[Array, "*space"]) -> Float32[Array, ""]:
    """One, but only once `x` is there: a factor of weights of which much is made. Each of these reads the weights where
    they lie, while the compiler copies what `after` makes of them. It comes out of a loop that never runs: a sum would
    become a part of all that the factor is in."""
    first = x[(0,) * x.ndim].astype(jnp.float32)

    def never(pair: tuple[Array, Array]) -> Array:
        return (pair[0] < 0) & (pair[0] > 0)

    return lax.while_loop(never, lambda pair: (pair[0] + 1, pair[1] + 1), (first, jnp.float32(1)))[1]


def together(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
    """The arrays, each only once all of them are there: what is read of an array before others are written over it.
    They come out of a loop that never runs, as in `once`."""

    def never(all: tuple[Array, ...]) -> Array:
        first = all[0][(0,) * all[0].ndim].astype(jnp.float32)
        return (first < 0) & (first > 0)

    return lax.while_loop(never, lambda all: tuple(each + 1 for each in all), arrays)
