"""Activations of half precision round once, at their end."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from sfumato.models.attention import GEGLU
from sfumato.models.layers import ACTIVATIONS

X = np.linspace(-4, 4, 2001)
HALF = {"bfloat16": 2.0**-8, "float16": 2.0**-11}
"""Half of the largest distance of two numbers of a type, in parts of them."""

EXACT = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "gelu": lambda x: x * (1 + erf(x / np.sqrt(2))) / 2,
}  # fmt: skip


def rounded_once(found, exact, dtype):
    """By no more than half of the distance of two numbers, and what float32 does not tell."""
    error = np.abs(np.asarray(found, np.float64) - exact)
    assert (error <= 1.01 * HALF[dtype] * np.abs(exact) + 1e-6).all(), error.max()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", EXACT)
def test_an_activation_rounds_once(name, dtype):
    x = jnp.asarray(X, dtype)
    found = jax.jit(ACTIVATIONS[name])(x)
    assert found.dtype == x.dtype
    rounded_once(found, EXACT[name](np.asarray(x, np.float64)), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_a_gated_layer_rounds_once_behind_its_product(dtype):
    layer = GEGLU(16, 24, rngs=nnx.Rngs(0))
    nnx.update(layer, jax.tree.map(lambda leaf: leaf.astype(dtype), nnx.state(layer)))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 16)), dtype)
    value, gate = np.split(np.asarray(layer.proj(x), np.float64), 2, axis=-1)
    found = layer(x)  # without jit: in one program the compiler leaves out the product's rounding, too
    assert found.dtype == x.dtype
    rounded_once(found, value * EXACT["gelu"](gate), dtype)
