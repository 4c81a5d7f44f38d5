"""Waiting for a layer's input changes no weights, and keeps what is made of them out of memory until then."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import compiler
from sfumato.models.kernels import after, winograd
from sfumato.models.kernels.order import once


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
