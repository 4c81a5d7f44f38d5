"""Every form of attention beside the map as a whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sfumato.models import kernels

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""By type: how far a form may be off, as a root mean square, by what it computes."""


def shapes(queries, keys, heads, width, dtype):
    """Queries, keys and values of two pictures, without numbers."""
    return tuple(jax.ShapeDtypeStruct((2, length, heads, width), dtype) for length in (queries, keys, keys))


def example(queries, keys, heads, width, dtype="float32"):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal(a.shape), dtype) for a in shapes(queries, keys, heads, width, dtype))


def same(form, q, k, v):
    """Values and gradients are those of the map as a whole, and of the same type."""
    whole, back = jax.vjp(lambda q, k, v: kernels.weigh(kernels.attention_map(q, k), v), q, k, v)
    found, found_back = jax.vjp(form, q, k, v)
    for one, other in zip((whole, *back(whole)), (found, *found_back(whole)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = (np.asarray(each, np.float64) for each in (one, other))
        assert np.square(one - other).mean() < (BOUNDS[q.dtype.name] * one.std()) ** 2
