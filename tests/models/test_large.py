"""A residual block of a large picture is the block, with fewer arrays in between."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato import compiler
from sfumato.models import large
from sfumato.models.blocks import ResnetBlock
from sfumato.models.int8 import Int8
from sfumato.models.kernels.table import Table, using
from sfumato.models.layers import GroupNorm, conv
from sfumato.models.vae import Decoder, VAEConfig

BOUNDS = {"float32": 1e-5, "bfloat16": 1e-2}
"""By type: how far a result may be off, as a root mean square, by its own."""


def table(**numbers):
    """In which small pictures are filtered, too, and in several blocks."""
    return Table(**{"channels": 8, "float32_f4": 1, "bfloat16_f2": 1, "f2_block": 2**9, "f4_block": 2**9} | numbers)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small pictures count as large."""
    monkeypatch.setattr(large, "MANY", 100)


def example(dtype, shape=(2, 16, 12), inputs=16, outputs=24, time=None, activation="silu"):
    """A block with numbers everywhere, a picture and an embedding of the time."""
    keys = iter(jax.random.split(jax.random.key(0), 100))
    block = ResnetBlock(
        inputs, outputs, time=time, groups=4, epsilon=1e-6, activation=activation, rngs=nnx.Rngs(0)
    )  # fmt: skip
    block = jax.tree.map(lambda a: (a + 0.1 * jax.random.normal(next(keys), a.shape)).astype(dtype), block)
    x = (1 + 2 * jax.random.normal(next(keys), (*shape, inputs))).astype(dtype)
    return block, x, None if time is None else jax.random.normal(next(keys), (len(x), time)).astype(dtype)


def exact(function, *given):
    """In float32, layer by layer."""
    return function(*jax.tree.map(lambda a: a.astype(jnp.float32), given))


def near(found, wanted, bound):
    found, wanted = (np.asarray(each, np.float32) for each in (found, wanted))
    assert np.sqrt(np.square(found - wanted).mean()) < bound * wanted.std()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("wide", [0, 1])
@pytest.mark.parametrize("blocks", [{}, {"f2_block": 2**16, "f4_block": 2**16}], ids=["many blocks", "one"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"outputs": 16},
        {"time": 7},
        {"shape": (1, 20, 8), "time": 3},
        {"shape": (3, 12, 12), "activation": "mish"},
        {"inputs": 32, "outputs": 16, "time": 5},
        {"inputs": 32, "outputs": 16, "shape": (1, 72, 8)},
    ],
    ids=["shortcut", "no shortcut", "time", "one picture", "mish", "half", "half, several times"],
)
def test_it_is_the_block(dtype, wide, blocks, shape):
    block, x, emb = example(dtype, **shape)
    with using(table(bfloat16_wide=wide, **blocks)):
        assert large.is_large(block, x)
        found = jax.jit(lambda *given: given[0](*given[1:]))(block, x, emb)
    assert found.dtype == dtype
    near(found, exact(ResnetBlock.plainly, block, x, emb), BOUNDS[dtype])


def ending(dtype, shape=(2, 16, 12), width=16, outputs=3):
    """Three blocks, of which the first halves the channels, a normalization, a convolution, and a picture."""
    first, x, _ = example(dtype, shape, 2 * width, width)
    others = [example(dtype, shape, width, width)[0] for _ in range(2)]
    norm = GroupNorm(4, width, epsilon=1e-6, rngs=nnx.Rngs(0))
    rest = norm, conv(width, outputs, rngs=nnx.Rngs(1))
    rest = jax.tree.map(lambda a: (a + 0.1 * jax.random.normal(jax.random.key(2), a.shape)).astype(dtype), rest)
    return ([first, *others], *rest), x


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("blocks", [{}, {"f2_block": 2**16, "f4_block": 2**16}], ids=["many blocks", "one"])
@pytest.mark.parametrize("shape", [(2, 16, 12), (1, 72, 8)], ids=["two pictures", "several bands"])
def test_the_end_of_a_decoder_is_its_layers(dtype, blocks, shape):
    end, x = ending(dtype, shape)
    with using(table(**blocks)):
        assert large.is_end(end, x)
        found = jax.jit(large.ended)(end, x)
    assert found.dtype == dtype
    near(found, exact(large._one_by_one, end, x), BOUNDS[dtype])


def test_gradients_of_the_end():
    end, x = ending("float32")
    with using(table()):
        out, pull = jax.vjp(large.ended, end, x)
        found = pull(jnp.cos(out))
    wanted, pull = jax.vjp(large._one_by_one, end, x)
    for one, other in zip(*map(jax.tree.leaves, (found, pull(jnp.cos(wanted)))), strict=True):
        near(one, other, 1e-4)


def test_what_is_no_end():
    (blocks, norm, last), x = ending("float32")
    with using(table()):
        assert large.is_end((blocks[:1], norm, last), x)
        assert not large.is_end((blocks[::-1], norm, last), x), "the first one does not halve the channels"
        assert not large.is_end((blocks[:1] * 2, norm, last), x), "the second one does, too"
        assert not large.is_end((blocks, norm, Int8(last)), x)
        assert not large.is_end((blocks, norm, conv(16, 3, 1, rngs=nnx.Rngs(0))), x)
        assert not large.is_end((blocks, norm, last), x[:, :6])


@pytest.mark.parametrize("remat", [False, True])
def test_a_decoder_ends_so(monkeypatch, remat):
    """Unless its blocks are to be computed again in the backward pass."""
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    config = VAEConfig(block_out_channels=(16, 32), norm_num_groups=4, **kinds)
    decoder = Decoder(config, rngs=nnx.Rngs(0))
    decoder.remat = remat
    x, calls = jax.random.normal(jax.random.key(0), (1, 8, 8, 4)), []
    wanted = decoder(x)
    monkeypatch.setattr(large, "ended", lambda *given, own=large.ended: calls.append(given) or own(*given))
    with using(table()):
        near(decoder(x), wanted, BOUNDS["float32"])
    assert len(calls) == (not remat)


def test_in_half_precision_it_is_more_exact_than_layer_by_layer():
    """What is added to the result of a convolution is added before it is rounded."""
    block, x, emb = example("bfloat16", time=7)
    wanted = exact(ResnetBlock.plainly, block, x, emb)
    with using(table()):
        off = [np.square(found - wanted).mean() for found in (block(x, emb), block.plainly(x, emb))]
    assert off[0] < off[1]


@pytest.mark.parametrize("time", [None, 7])
def test_gradients(time):
    block, x, emb = example("float32", time=time)
    with using(table()):
        out, pull = jax.vjp(lambda *given: given[0](*given[1:]), block, x, emb)
        found = pull(jnp.cos(out))
    wanted, pull = jax.vjp(ResnetBlock.plainly, block, x, emb)
    for one, other in zip(*map(jax.tree.leaves, (found, pull(jnp.cos(wanted)))), strict=True):
        near(one, other, 1e-4)


def test_what_is_not_large():
    block, x, _ = example("float32")
    with using(table()):
        assert large.is_large(block, x)
        assert not large.is_large(block, x[:, :6])
        assert not large.is_large(block, x[:, :14]), "tiles must be whole"
        assert not large.is_large(block, x.astype(jnp.float16))
        block.conv2 = Int8(block.conv2)
        assert not large.is_large(block, x)
    assert not large.is_large(example("float32")[0], x), "few channels"


def test_elsewhere_it_is_layer_by_layer():
    block, x, _ = example("float32")
    with using(table()):
        for platform, own in (("cuda", True), ("cpu", False)):
            text = jax.export.export(jax.jit(lambda x: block(x)), platforms=[platform])(x).mlir_module()
            assert ("stablehlo.convolution" in text) == own, platform


def test_one_array_lies_between_two_convolutions():
    block, x, _ = example("bfloat16", (1, 256, 256), 96, 96)
    with using(Table(bfloat16_wide=0)):
        assert large.is_large(block, x)
        run = jax.jit(lambda block, x: block(block(x)).sum(), compiler_options=compiler.options())
        analysis = run.lower(block, x).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 4.5 * x.nbytes  # 4.1; layer by layer 5


def test_halved_channels_lie_where_the_picture_lay():
    block, x, _ = example("bfloat16", (1, 256, 256), 192, 96)
    with using(Table(bfloat16_wide=0)):
        assert large.is_large(block, x)
        run = jax.jit(lambda block, x: block(x + 1).sum(), compiler_options=compiler.options())
        analysis = run.lower(block, x).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 2.2 * x.nbytes  # 2.0; layer by layer 3.0


def test_a_decoder_ends_where_the_picture_lay():
    end, x = ending("float32", (1, 512, 256), 96)
    with using(Table()):
        assert large.is_end(end, x)
        run = jax.jit(lambda end, x: large.ended(end, x + 1), compiler_options=compiler.options())
        analysis = run.lower(end, x).compile().memory_analysis()
    assert analysis is not None
    assert analysis.temp_size_in_bytes < 1.7 * x.nbytes  # 1.6; block by block 2.1, layer by layer 2.7
