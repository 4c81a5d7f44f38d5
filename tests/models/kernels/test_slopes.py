"""Gradients of convolutions inside loops."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import compiler
from sfumato.models.kernels import conv_general_dilated, inside_loop
from sfumato.models.kernels.slopes import LAST, is_inside

CASES = [  # stride, padding, size of the kernel
    ((1, 1), ((1, 1), (1, 1)), (3, 3)), ((2, 2), ((1, 1), (1, 1)), (3, 3)), ((2, 2), ((0, 1), (0, 1)), (3, 3)),
    ((1, 2), ((1, 1), (0, 0)), (3, 3)), ((1, 1), ((2, 2), (2, 2)), (5, 5)), ((2, 2), ((0, 0), (0, 0)), (1, 1)),
    ((4, 4), ((0, 0), (0, 0)), (4, 4)),
]  # fmt: skip


def arrays(size, channels=(5, 7), kernel=(3, 3), batch=2):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *size, channels[0]), np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((*kernel, *channels), np.float32))


@pytest.mark.parametrize("size", [(8, 8), (9, 6)], ids=str)
@pytest.mark.parametrize(("stride", "pads", "kernel"), CASES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_they_are_those_of_jax(dtype, stride, pads, kernel, size):
    x, weights = (each.astype(dtype) for each in arrays(size, kernel=kernel))

    def ours(x, weights):
        return conv_general_dilated(x, weights, stride, pads, dimension_numbers=LAST)

    def plain(x, weights):
        return jax.lax.conv_general_dilated(x, weights, stride, pads, dimension_numbers=LAST)

    wide = x.astype(jnp.float32), weights.astype(jnp.float32)
    out, wanted = jax.vjp(plain, *wide)
    gradient = jnp.cos(jnp.arange(out.size, dtype=jnp.float32).reshape(out.shape)).astype(dtype)
    with inside_loop():
        found = jax.vjp(ours, x, weights)[1](gradient)
    for one, other in zip(found, wanted(gradient.astype(jnp.float32)), strict=True):
        assert one.dtype == dtype
        off = np.abs(np.asarray(one, np.float32) - other).max() / np.asarray(other).std()
        assert off < (1e-4 if dtype == "float32" else 4e-2)


@pytest.mark.parametrize("channels", [(5, 7), (96, 100)], ids=["few channels", "many"])
@pytest.mark.parametrize("told", [compiler.LATE, compiler.BARRIERS], ids=["late", "barriers"])
def test_a_loop_has_convolutions_of_one_form(channels, told):
    """Any other the compiler would make place by place."""
    x, weights = arrays((8, 8), channels)

    def loss(weights, x):
        # A further convolution before it, so that there is a gradient by an input, too.
        x = conv_general_dilated(x, weights[..., : channels[0]], (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAST)
        return jnp.square(conv_general_dilated(x, weights, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAST)).mean()

    def steps(weights, xs):
        def one(total, x):
            with inside_loop():
                return total + jax.grad(loss)(weights, x), None

        return jax.lax.scan(one, jnp.zeros_like(weights), xs)[0]

    run = jax.jit(steps, compiler_options=compiler.options(light=True, told=told))
    text = run.lower(weights, jnp.stack([x, x + 1])).compile().as_text()
    assert text is not None
    assert "while(" in text
    assert set(re.findall(r"dim_labels=(\S+?)[,\s]", text)) == {"b01f_01io->b01f"}


def test_it_holds_inside_alone():
    assert not is_inside()
    with inside_loop():
        assert is_inside()
    assert not is_inside()
