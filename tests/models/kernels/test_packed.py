"""What a loop reads and writes by pieces is the same packed, and is not widened."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfumato.models.kernels.packed import packed, unpacked

SHAPE = (16, 8, 4)


def doubled(x, pack=packed, unpack=unpacked):
    """Twice `x`, line by line."""
    lines = pack(x)

    def one(number, out):
        line = unpack(lax.dynamic_index_in_dim(lines, number, keepdims=False), x.dtype)
        made = (2 * line.astype(jnp.float32)).astype(x.dtype)
        return lax.dynamic_update_index_in_dim(out, pack(made), number, 0)

    return unpack(lax.fori_loop(0, len(x), one, jnp.zeros_like(lines)), x.dtype)


def wide(call):
    """Whether the program has the whole of the array in float32 anywhere."""
    text = jax.jit(call).lower(jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)).compile().as_text()
    return re.search(r"f32\[16,8,4\]", text) is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values(dtype):
    x = (
        jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), dtype)
        .at[0, 0]
        .set(jnp.array([0, -0.0, jnp.inf, 1]))
    )
    found = doubled(x)
    assert found.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(x + x, np.float32))


def test_float32_is_left_as_it_is():
    x = jnp.ones(SHAPE)
    assert packed(x) is x
    assert unpacked(x, x.dtype) is x


def test_it_is_not_widened():
    assert wide(lambda x: doubled(x, lambda x: x, lambda x, dtype: x)), "packing is not needed any more"
    assert not wide(doubled)
