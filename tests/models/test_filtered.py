"""A convolution with a prepared kernel is the convolution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.models import filtered, kernels
from sfumato.models.filtered import Filtered, is_large
from sfumato.models.held import held
from sfumato.models.kernels import convolution, winograd
from sfumato.models.kernels.table import Table, using
from sfumato.models.layers import conv, linear

from oracle import assert_close

BOUNDS = {"float32": 1e-5, "bfloat16": 2e-2}
"""By type: how far a result may be off, as a root mean square, by its own."""


def layer_of(dtype="float32", bias=True, inputs=12, outputs=20):
    layer = conv(inputs, outputs, bias=bias, rngs=nnx.Rngs(0))
    if bias:
        layer.bias.set_value(jnp.linspace(-1, 1, outputs))
    return jax.tree.map(lambda a: a.astype(dtype), layer)


def draw(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)


def near(found, wanted, dtype):
    found, wanted = (np.asarray(each, np.float32) for each in (found, wanted))
    assert np.square(found - wanted).mean() < (BOUNDS[dtype] * wanted.std()) ** 2


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("few", [2**6, 2**20], ids=["many blocks", "one block"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_by_the_picture(monkeypatch, dtype, wide, few, bias):
    """Of an odd number of places, too."""
    monkeypatch.setattr(convolution, "FEW", few)
    layer, x, gradient = layer_of(dtype, bias), draw(2, 7, 9, 12, dtype=dtype), draw(2, 7, 9, 20)
    with using(Table(bfloat16_wide=wide)):
        found, back = jax.vjp(Filtered(layer), x)
        wanted, wanted_back = jax.vjp(lambda x: layer(x), x)
        assert found.dtype == wanted.dtype == dtype
        near(found, wanted, dtype)
        near(*(pull(gradient.astype(dtype))[0] for pull in (back, wanted_back)), dtype)


@pytest.mark.parametrize("places", [4, 400], ids=["few places", "many"])
def test_the_block_goes_by_the_places(monkeypatch, places):
    blocks = []
    monkeypatch.setattr(winograd, "filtered", lambda x, kernel, form, block: blocks.append(block) or x)
    with using(Table(bfloat16_f2=100, f2_block=2**16)):
        kernels.filtered(draw(1, 1, places, 4, dtype="bfloat16"), draw(16, 4, 4, dtype="bfloat16"))
    assert blocks == [convolution.FEW if places == 4 else 2**16]


def test_kernels_there_and_back():
    kernel = layer_of().kernel[...]
    moved = kernels.in_basis(kernel)
    assert moved.shape == (16, *kernel.shape[2:])
    np.testing.assert_allclose(winograd.back(moved), kernel, atol=1e-6)
    np.testing.assert_allclose(
        winograd.turned(moved), kernels.in_basis(kernel[::-1, ::-1].swapaxes(2, 3)), atol=1e-6
    )  # fmt: skip


@pytest.mark.parametrize("dtype", BOUNDS)
def test_it_stands_for_the_layer(dtype):
    layer, x = layer_of(dtype), draw(1, 4, 4, 12, dtype=dtype)
    made = Filtered(layer)
    assert made.kernel.shape == layer.kernel.shape
    assert made.kernel[...].dtype == layer.kernel[...].dtype == dtype, "the layer that went in stays"
    near(made.kernel[...], layer.kernel[...], dtype)
    assert isinstance(made.restored(x), nnx.Conv)
    near(made.restored(x)(x), layer(x), dtype)
    assert held(nnx.List([layer])) is None
    assert held(nnx.List([layer, made])) is Filtered


def test_programs_for_gpus_have_their_own_convolution():
    made, x = Filtered(layer_of()), draw(1, 4, 4, 12)
    traced = jax.jit(lambda made, x: made(x)).trace(made, x)
    assert "stablehlo.convolution" in traced.lower(lowering_platforms=("cuda",)).as_text()
    own = traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "stablehlo.convolution" not in own
    assert_close(made(x), layer_of()(x), 1e-5)


@pytest.mark.parametrize(
    ("layer", "large"),
    [
        (lambda: layer_of(), True), (lambda: layer_of("bfloat16"), True), (lambda: layer_of("float16"), False),
        (lambda: layer_of(outputs=4), False), (lambda: linear(64, 64, rngs=nnx.Rngs(0)), False),
        (lambda: conv(64, 64, 1, rngs=nnx.Rngs(0)), False), (lambda: conv(64, 64, stride=2, rngs=nnx.Rngs(0)), False),
        (lambda: conv(64, 64, padding=((0, 1), (0, 1)), rngs=nnx.Rngs(0)), False),
        (lambda: conv(64, 64, padding=((1, 1), (1, 1)), rngs=nnx.Rngs(0)), True),
    ],
)  # fmt: skip
def test_what_is_large(monkeypatch, layer, large):
    monkeypatch.setattr(filtered, "LEAST", 100)
    assert is_large(layer()) is large
