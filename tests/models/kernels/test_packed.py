"""What a loop reads and writes by pieces is the same packed, and is not widened."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfumato.models.kernels.packed import packed, unpacked

SHAPE = (16, 8, 4)


def doubled(x):
    """Twice `x`, line by line."""
    lines = packed(x)

    def one(number, out):
        line = unpacked(lax.dynamic_index_in_dim(lines, number, keepdims=False), x.dtype)
        made = (2 * line.astype(jnp.float32)).astype(x.dtype)
        return lax.dynamic_update_index_in_dim(out, packed(made), number, 0)

    return unpacked(lax.fori_loop(0, len(x), one, jnp.zeros_like(lines)), x.dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values(dtype):
    x = np.random.default_rng(0).standard_normal(SHAPE)
    x[0, 0] = 0, -0.0, np.inf, 1
    x = jnp.asarray(x, dtype)
    found = doubled(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(x + x, np.float32))


def test_float32_is_left_as_it_is():
    x = jnp.ones(SHAPE)
    assert packed(x) is x
    assert unpacked(x, x.dtype) is x


def test_it_is_not_widened():
    """The program has the whole of the array in float32 nowhere, as it has by jax 0.10 without packing."""
    text = jax.jit(doubled).lower(jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)).compile().as_text()
    assert "bf16[16,8,4]" in text
    assert "f32[16,8,4]" not in text
