"""What the blocks of the networks take of memory; what they compute is in the tests of the networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from sfumato import compiler
from sfumato.models.blocks import ResnetBlock
from sfumato.models.kernels.table import Table, using


def test_the_way_around_a_residual_block_comes_first():
    """Where it is a convolution, so that what the block is given is not kept beside what it makes of it."""
    block = ResnetBlock(64, 32, time=None, groups=4, epsilon=1e-6, rngs=nnx.Rngs(0))
    block = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), block)
    x = jax.ShapeDtypeStruct((1, 256, 256, 64), jnp.bfloat16)
    with using(Table()):  # bfloat16 as it is: float32 of what the backend's own convolution takes would count, too
        program = jax.jit(lambda block, x: block(x + 1), compiler_options=compiler.options()).lower(block, x).compile()
    used = program.memory_analysis().temp_size_in_bytes
    assert used < 3.5 * x.size * x.dtype.itemsize  # 3; left to the compiler 4
