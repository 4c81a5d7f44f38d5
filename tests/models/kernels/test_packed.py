"""What a loop reads and writes by pieces is the same packed, and is not widened."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sfumato.models.kernels.packed import joined, moved, packed, unpacked

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


def turned(*arrays):
    return jnp.pad(jnp.concatenate(arrays).swapaxes(0, 1), ((0, 1), (0, 0), (0, 0)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_moved_has_its_gradients(dtype):
    """Forward and backward."""
    rng = np.random.default_rng(0)
    one, other, away = (jnp.asarray(rng.standard_normal(SHAPE), dtype) for _ in range(3))
    value, gradient = jax.jvp(lambda one: moved(turned, one, other), (one,), (away,))
    np.testing.assert_array_equal(value, turned(one, other))
    np.testing.assert_array_equal(gradient, turned(away, 0 * other))
    back = jax.grad(lambda one: (moved(turned, one, other) ** 2).sum(dtype="float32"))(one)
    np.testing.assert_array_equal(back, 2 * one)


def test_what_is_moved_is_not_widened():
    shape = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    text = jax.jit(lambda one, other: moved(turned, one, other)).lower(shape, shape).compile().as_text()
    assert "f32[" not in text


@pytest.mark.parametrize("types", [("float32",) * 2, ("bfloat16",) * 2, ("float16",) * 2, ("bfloat16", "float32")])
def test_what_is_joined_stands_side_by_side(types):
    """As jax has it, with its gradients."""
    rng = np.random.default_rng(0)
    some, others = (
        jnp.asarray(rng.standard_normal((2, 3, width)), dtype) for width, dtype in zip((4, 5), types, strict=True)
    )
    wished = jnp.concatenate([some, others], axis=-1)
    found = joined(some, others)
    assert found.dtype == wished.dtype
    np.testing.assert_array_equal(found, wished)
    back = jax.grad(lambda others: (joined(some, others) ** 2).sum(dtype="float32"))(others)
    np.testing.assert_array_equal(back, 2 * others)


def test_what_is_joined_is_not_widened():
    shape = jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16)
    text = jax.jit(joined).lower(shape, shape).compile().as_text()
    assert "bf16[16,8,8]" in text
    assert "f32[" not in text
