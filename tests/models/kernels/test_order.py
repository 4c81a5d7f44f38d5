"""Waiting for a layer's input changes no weights, and keeps what is made of them out of memory until then."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import compiler
from sfumato.models.kernels import after, winograd
from sfumato.models.kernels.order import once, together


@pytest.mark.parametrize("first", [0.0, -0.0, 2.5, -1e30, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize(
    "weights", [np.arange(-127, 128, dtype=np.int8), np.float32([1.5, -2.0, 0.0, 3e38])], ids=["int8", "float32"]
)
def test_waiting_for_the_input_changes_nothing(first, weights):
    weights = jnp.asarray(weights)
    np.testing.assert_array_equal(jax.jit(after)(jnp.full((1, 2), first), weights), weights)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("first", [0.0, -0.0, 2.5, -1e30, np.inf, -np.inf, np.nan])
def test_one_is_one_whatever_the_input(first, dtype):
    assert jax.jit(once)(jnp.full((1, 2), first, dtype)) == 1


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("first", [0.0, 2.5, np.inf, np.nan])
def test_what_comes_together_is_what_it_was(first, dtype):
    some, other = jnp.full((1, 2), first, dtype), jnp.arange(3)
    for found, wanted in zip(jax.jit(together)((some, other)), (some, other), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_an_array_is_overwritten_where_it_lies_once_it_has_been_read_together():
    """Otherwise the compiler copies all of it."""

    def run(x):
        def one(number, state):
            x, above = state
            part = jax.lax.dynamic_slice_in_dim(x, number, 1)
            part, last = together((jnp.sin(part) + above, part))
            return jax.lax.dynamic_update_slice_in_dim(x, part, number, 0), last

        return jax.lax.fori_loop(0, 64, one, (x + 1, x[:1]))[0].sum()

    x = jax.ShapeDtypeStruct((64, 2**12), jnp.float32)
    analysis = jax.jit(run, compiler_options=compiler.options()).lower(x).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 1.2 * 64 * 2**12 * 4


@pytest.mark.parametrize("form", [winograd.F2, winograd.F4, winograd.TWICE], ids=["F2", "F4", "TWICE"])
def test_in_a_loop_one_changed_kernel_is_in_memory_at_a_time(form):
    width, count = 256, 6
    kernels = [jax.ShapeDtypeStruct((3, 3, width, width), jnp.float32)] * count

    def run(kernels, x):
        def body(x, _):
            for kernel in kernels:
                x = jnp.tanh(winograd.convolve(x, kernel, form, 2**18)[:, :8, :8])
            return x, None

        return jax.lax.scan(body, x, length=3)[0]

    x = jax.ShapeDtypeStruct((1, 8, 8, width), jnp.float32)
    analysis = jax.jit(run, compiler_options=compiler.options()).lower(kernels, x).compile().memory_analysis()
    assert analysis is not None
    changed = len(form.data) ** 2 * width * width * 4
    assert analysis.temp_size_in_bytes < 2.5 * changed  # of six
