"""What is computed when."""

from __future__ import annotations

from jaxtyping import Array, Float, Shaped


def after(x: Float[Array, "*space"], weights: Shaped[Array, "*shape"]) -> Shaped[Array, "*shape"]:
    """`weights`, but only once `x` is there.

    What is made of weights alone depends on no data. Left to itself the compiler makes it of those of all layers before
    the first is needed, and before a loop that needs it again, so that all of it is in memory at once.
    `jax.lax.optimization_barrier` says the same, but the CPU compiler drops it; this it cannot see through: what is
    added is zero for every number (and for NaN).
    """
    first = x[(0,) * x.ndim]
    return weights + ((first < 0) & (first > 0)).astype(weights.dtype)
