"""What the blocks of the networks take of memory, and the layers they may hold; what they compute is in the tests of
the networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sfumato import compiler
from sfumato.adapters.delta import LowRank
from sfumato.adapters.live import adapted
from sfumato.models.blocks import ResnetBlock, Upsample, nearest
from sfumato.models.filtered import Filtered
from sfumato.models.int8 import Int8
from sfumato.models.kernels.table import Table, using

from oracle import assert_close


def test_the_way_around_a_residual_block_comes_first():
    """Where it is a convolution, so that what the block is given is not kept beside what it makes of it."""
    block = ResnetBlock(64, 32, time=None, groups=4, epsilon=1e-6, rngs=nnx.Rngs(0))
    block = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), block)
    x = jax.ShapeDtypeStruct((1, 256, 256, 64), jnp.bfloat16)
    with using(Table()):  # bfloat16 as it is: float32 of what the backend's own convolution takes would count, too
        program = jax.jit(lambda block, x: block(x + 1), compiler_options=compiler.options()).lower(block, x).compile()
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 3.5 * x.size * x.dtype.itemsize  # 3; left to the compiler 4


def low_rank(layer):
    rank, channels = 2, layer.kernel.shape[-1]
    down = jax.random.normal(jax.random.key(1), (rank, channels, 3, 3)) / 30
    up = jax.random.normal(jax.random.key(2), (channels, rank, 1, 1))
    return adapted(layer, LowRank(down, up), jnp.float32(0.7))


@pytest.mark.parametrize("held", [lambda layer: layer, Int8, Filtered, low_rank], ids=["", "int8", "prepared", "LoRA"])
@pytest.mark.parametrize("size", [None, (10, 8), (9, 8), (10, 7)], ids=str)
def test_a_doubled_picture_is_that_of_nearest_neighbours_whatever_the_layer(held, size):
    up = Upsample(96, rngs=nnx.Rngs(0))
    up.conv.bias.set_value(jnp.linspace(-1, 1, 96))
    up.conv = held(up.conv)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4, 96))
    assert_close(up(x, size), up.conv(nearest(x, size or (10, 8))), 1e-5)
