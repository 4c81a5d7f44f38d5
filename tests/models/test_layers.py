"""In half precision, activations round once, at their end, and gradients of biases are summed up in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from sfumato.models import kernels
from sfumato.models.attention import GEGLU
from sfumato.models.blocks import Upsample
from sfumato.models.filtered import Filtered
from sfumato.models.layers import ACTIVATIONS, conv, linear

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


LAYERS = {
    "linear": lambda rngs: linear(4, 8, rngs=rngs), "conv": lambda rngs: conv(4, 8, rngs=rngs),
    "1x1": lambda rngs: conv(4, 8, 1, rngs=rngs), "stride": lambda rngs: conv(4, 8, stride=2, rngs=rngs),
    "many channels": lambda rngs: conv(4, 128, rngs=rngs), "doubled": lambda rngs: Upsample(4, rngs=rngs).conv,
    "prepared": lambda rngs: Filtered(conv(4, 8, rngs=rngs)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_gradient_of_a_bias_counts_every_place(name):
    """Ones for all places: their sum is the number of places, beyond 256 as well."""
    layer = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), LAYERS[name](nnx.Rngs(0)))
    x = jnp.ones((2, 64, 64, 4), "bfloat16")
    found = jax.jit(jax.grad(lambda layer: layer(x).astype(jnp.float32).sum()))(layer).bias[...]
    places = jax.eval_shape(layer, x).size // found.size
    np.testing.assert_allclose(found.astype(jnp.float32), places, rtol=1e-2)


def test_what_is_added_for_each_picture_counts_every_place():
    """As the time in a residual block."""
    x, time = jnp.zeros((3, 64, 64, 5), "bfloat16"), jnp.zeros((3, 5), "bfloat16")
    found = jax.jit(jax.grad(lambda time: kernels.plus(x, time[:, None, None]).astype(jnp.float32).sum()))(time)
    np.testing.assert_array_equal(found.astype(jnp.float32), 64 * 64)
