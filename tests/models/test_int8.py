"""int8 kernels are as near as rounding allows, and never all turned back at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.models.held import held
from sfumato.models.int8 import Int8, rounded
from sfumato.models.layers import conv, linear

from oracle import assert_close, fresh

RNG = np.random.default_rng(0)
SHAPES = [(24, 10), (3, 3, 6, 12), (1, 1, 6, 12)]


def draw(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), dtype)


def restored(layer: Int8, dtype: Any = jnp.float32) -> Any:
    return layer.restored(jnp.zeros((1,) * layer.kernel.ndim, dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_number_is_off_by_more_than_half_a_scale(shape, dtype):
    """But for the last bits of the product in float32. Channels of very different sizes each have their own scale."""
    kernel = (draw(*shape) * 10.0 ** jnp.arange(-4, shape[-1] - 4)).astype(dtype).clip(-6e4, 6e4)
    whole, scale = rounded(kernel)
    assert (whole.dtype, scale.dtype, scale.shape) == (jnp.int8, jnp.float32, shape[-1:])
    wide = np.asarray(kernel, np.float64)
    off = np.abs(wide - np.asarray(whole, np.float64) * np.asarray(scale))
    assert (off <= np.asarray(scale) * (0.5 + 127 * 2**-22)).all()
    axes = tuple(range(len(shape) - 1))
    assert (np.abs(np.asarray(whole, int)).max(axes) == 127).all()


def test_zeros_stay_and_a_channel_of_zeros_is_one():
    kernel = jnp.where(RNG.uniform(size=(40, 6)) < 0.5, draw(40, 6), 0).at[:, 2].set(0)
    whole, scale = rounded(kernel)
    back = whole * scale
    np.testing.assert_array_equal(back == 0, np.abs(kernel) <= scale / 2)
    assert (back[kernel == 0] == 0).all()
    assert scale[2] == 0


LAYERS = {
    "dense": (lambda rngs: linear(32, 48, rngs=rngs), (2, 5, 32)),
    "dense without bias": (lambda rngs: linear(32, 48, bias=False, rngs=rngs), (2, 5, 32)),
    "convolution": (lambda rngs: conv(32, 48, rngs=rngs), (2, 6, 6, 32)),
    "strided convolution": (lambda rngs: conv(32, 48, stride=2, padding=((0, 1), (0, 1)), rngs=rngs), (2, 6, 6, 32)),
    "convolution of one place": (lambda rngs: conv(32, 48, 1, rngs=rngs), (2, 6, 6, 32)),
    "convolution in another form": (lambda rngs: conv(96, 96, rngs=rngs), (1, 32, 32, 96)),
}


def layer_of(kind: str) -> Any:
    return fresh(lambda config, rngs: LAYERS[kind][0](rngs), None)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_the_one_with_restored_kernel_also_backward(kind):
    layer, x = layer_of(kind), draw(*LAYERS[kind][1])
    made = Int8(layer)
    assert made.kernel[...].dtype == jnp.int8
    assert layer.kernel[...].dtype == jnp.float32, "the layer that went in stays"
    other = restored(made)
    np.testing.assert_allclose(made(x), other(x), rtol=1e-6, atol=1e-5)
    backward = [jax.grad(lambda x, net=net: (net(x) ** 2).sum())(x) for net in (made, other)]
    assert_close(*backward, tol=1e-6)
    assert_close(made(x), layer(x), tol=0.01)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_computes_in_the_type_of_its_input(dtype):
    layer = jax.tree.map(lambda a: a.astype(dtype), layer_of("dense"))
    made, x = Int8(layer), draw(2, 5, 32, dtype=dtype)
    assert made(x).dtype == dtype
    assert restored(made, dtype).kernel[...].dtype == dtype
    assert_close(np.float32(made(x)), np.float32(layer(x)), tol=0.02)


def test_half_precision_does_not_overflow_where_the_layer_does_not():
    """Sums of whole numbers would: 2000 x 100 x 127 is far above 65504."""
    layer = linear(100, 3, rngs=nnx.Rngs(0))
    layer.kernel.set_value(jnp.full((100, 3), 1e-3))
    made = Int8(jax.tree.map(lambda a: a.astype("float16"), layer))
    np.testing.assert_allclose(np.float32(made(jnp.full((1, 100), 2000, jnp.float16))), 200, rtol=0.01)


def test_kernels_are_turned_back_one_at_a_time():
    """Neither all at first nor ahead of a loop: there is never room for two of them."""
    width, count = 256, 8
    layers = nnx.List([Int8(linear(width, width, bias=False, rngs=nnx.Rngs(i))) for i in range(count)])

    def run(layers: nnx.List, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            for layer in layers:
                x = jnp.tanh(layer(x))
            return x, None

        return jax.lax.scan(body, x, length=3)[0]

    analysis = jax.jit(run).lower(layers, draw(4, width)).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 1.5 * width * width * 4


def test_what_has_int8_kernels_is_told():
    layers = nnx.List([layer_of("dense"), layer_of("dense")])
    assert held(layers) is None
    layers[1] = Int8(layers[1])
    assert held(layers) is Int8
