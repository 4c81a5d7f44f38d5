"""The convolution of a doubled picture, without that picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import compiler
from sfumato.models.kernels import conv_of_doubled, twice, winograd
from sfumato.models.kernels.convolution import native
from sfumato.models.kernels.table import Table, using

from convolutions import BOUNDS, example, gap


def plain(x, kernel, bias=0.0):
    return native(jnp.kron(x, jnp.ones((1, 2, 2, 1), x.dtype)), kernel) + bias


@pytest.mark.parametrize("block", [2**5, 2**16], ids=["many blocks", "several pictures"])
@pytest.mark.parametrize("shape", [(1, 8, 8, 5, 7), (2, 7, 9, 3, 4), (3, 1, 1, 2, 2), (6, 5, 2, 4, 3)], ids=str)
def test_the_form_is_the_convolution_of_the_doubled_picture(shape, block):
    x, kernel = example(shape)
    found = winograd.convolve(x, kernel, winograd.TWICE, block)
    assert found.dtype == x.dtype
    assert gap(found, plain(x, kernel)) < BOUNDS["float32"]


@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("places", [(1, 8, 8), (2, 33, 31)], ids=str)
def test_what_a_processor_computes_and_its_gradients(wide, dtype, places):
    given = *example((*places, 96, 128), dtype), jnp.linspace(-1, 1, 128, dtype=dtype)
    with using(Table(bfloat16_wide=wide)):
        out, back = jax.vjp(conv_of_doubled, *given)
        gradient = 1 + jnp.cos(jnp.arange(out.size).reshape(out.shape)).astype(dtype)
        gradients = back(gradient)
    wanted, back = jax.vjp(plain, *(each.astype(jnp.float32) for each in given))
    assert gap(out, wanted) < BOUNDS[dtype]
    *gradients, bias = gradients
    *expected, wanted = back(gradient.astype(jnp.float32))
    np.testing.assert_allclose(bias.astype(jnp.float32), wanted, rtol=BOUNDS[dtype])
    for found, wanted in zip(gradients, expected, strict=True):
        assert found.dtype == dtype
        assert gap(found, wanted) < BOUNDS[dtype]


def test_it_is_as_exact_as_the_convolution_itself():
    """In bfloat16 both are rounded once, and so is each form's kernel; F(4x4) would be off by ten times as much."""
    x, kernel = example((1, 16, 16, 128, 128), "bfloat16")
    exact = plain(x.astype(jnp.float32), kernel.astype(jnp.float32))

    def off(found):
        return np.sqrt(np.square(np.asarray(found, np.float32) - exact).mean()) / exact.std()

    with using(Table(bfloat16_wide=0)):
        assert off(conv_of_doubled(x, kernel)) < 1.5 * off(winograd.convolve(twice(x), kernel, winograd.F2, 2**18))


def test_on_processors_the_doubled_picture_is_not_made():
    x, kernel = example((1, 256, 256, 128, 128), "bfloat16")
    with using(Table(bfloat16_wide=0)):
        run = jax.jit(lambda x, kernel: conv_of_doubled(x + 1, kernel).sum(), compiler_options=compiler.options())
        program = run.lower(x, kernel).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8.5 * x.nbytes  # the result twice; otherwise 9.2


def test_few_channels_take_the_doubled_picture():
    x, kernel = example((2, 4, 5, 8, 96))
    bias = jnp.linspace(-1, 1, 96)
    assert gap(conv_of_doubled(x, kernel, bias), plain(x, kernel, bias)) < BOUNDS["float32"]
    assert "while" not in str(jax.make_jaxpr(conv_of_doubled)(x, kernel))


def test_elsewhere_it_is_the_backends_own():
    x, kernel = example((1, 32, 32, 96, 96))
    for platform, own in (("cuda", True), ("tpu", True), ("cpu", False)):
        text = jax.export.export(jax.jit(conv_of_doubled), platforms=[platform])(x, kernel).mlir_module()
        assert ("stablehlo.convolution" in text) == own, platform


def test_numbers_are_repeated():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(
        twice(x)[0, :, :, 0], [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]
    )
