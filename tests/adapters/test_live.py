"""Layers with adapters beside them do what merged layers do, and are good pytrees."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from sfumato.adapters.delta import Delta, Full, LoHa, LoKr, LowRank
from sfumato.adapters.live import Adapted, adapted, copied, find, is_live, merged, replaced
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.int8 import Int8
from sfumato.models.layers import GroupNorm, conv, layer_norm, linear
from sfumato.models.unet import UNet
from sfumato.types import Conditioning

from models.tiny import SD1
from oracle import assert_close, fresh
from pipelines import SMALL

RNG = np.random.default_rng(3)
I, O, R = 8, 12, 3  # noqa: E741


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


LAYERS: dict[str, Any] = {
    "dense": lambda rngs: linear(I, O, rngs=rngs),
    "dense without bias": lambda rngs: linear(I, O, bias=False, rngs=rngs),
    "convolution": lambda rngs: conv(I, O, stride=2, rngs=rngs),
    "convolution, padded on one side": lambda rngs: conv(I, O, stride=2, padding=((0, 1), (0, 1)), rngs=rngs),
    "convolution of one place": lambda rngs: conv(I, O, 1, rngs=rngs),
    "layer norm": lambda rngs: layer_norm(I, rngs=rngs),
    "group norm": lambda rngs: GroupNorm(4, I, epsilon=1e-5, rngs=rngs),
}
SIDES = {"convolution": (3, 3), "convolution, padded on one side": (3, 3), "convolution of one place": (1, 1)}


def layer_of(kind: str) -> Any:
    return fresh(lambda config, rngs: LAYERS[kind](rngs), None)


def deltas(kind: str) -> dict[str, Delta]:
    """One of each kind that this layer takes."""
    if "norm" in kind:
        return {"full": Full(draw(I), draw(I)), "only a bias": Full(bias=draw(I))}
    sides = SIDES.get(kind, ())
    places, ones = int(np.prod(sides)), (1,) * len(sides)
    some: dict[str, Delta] = {
        "LoRA": LowRank(draw(R, I, *sides), draw(O, R, *ones), scale=0.5),
        "DoRA": LowRank(draw(R, I, *sides), draw(O, R, *ones), magnitude=abs(draw(O))),
        "LoHa": LoHa(draw(O, R), draw(R, I * places), draw(O, R), draw(R, I * places), scale=jnp.float32(2)),
        "LoKr": LoKr(w1=draw(4, 2), w2=draw(3, 4, *sides)),
        "full": Full(draw(O, I, *sides), None if "without" in kind else draw(O)),
    }
    if places > 1:
        some["Tucker"] = LowRank(draw(R, I, 1, 1), draw(O, R, 1, 1), draw(R, R, *sides), scale=0.5)
    if sides == (1, 1):
        some["LoRA, stored as dense"] = LowRank(draw(R, I), draw(O, R))
    if kind == "dense":
        some["LoRA, stored as a convolution"] = LowRank(draw(R, I, 1, 1), draw(O, R, 1, 1))
    return some


CASES = [pytest.param(kind, name, id=f"{kind}-{name}") for kind in LAYERS for name in deltas(kind)]


def picture(kind: str) -> jax.Array:
    return draw(2, 9, 7, I) if kind in SIDES or kind == "group norm" else draw(2, 5, I)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_live_is_merged(kind, name):
    layer, delta, x = layer_of(kind), deltas(kind)[name], picture(kind)
    call = jax.jit(lambda layer, x: layer(x))
    for strength in (jnp.float32(0.7), jnp.float32(-2)):
        live, once = adapted(layer, delta, strength), merged(layer, delta, strength)
        assert isinstance(live, Adapted)
        assert type(once) is type(layer)
        assert_close(call(live, x), call(once, x), 1e-6)
        assert np.abs(call(live, x) - call(layer, x)).max() > 1e-2, "nothing was changed"


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if "norm" not in case.values[0]])
def test_live_on_an_int8_layer_is_live_on_what_it_stands_for(kind, name):
    whole, delta, x = Int8(layer_of(kind)), deltas(kind)[name], picture(kind)
    call, plain = jax.jit(lambda layer, x: layer(x)), whole.restored(x)
    for strength in (jnp.float32(0.7), jnp.float32(0)):
        assert_close(call(adapted(whole, delta, strength), x), call(adapted(plain, delta, strength), x), 1e-6)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_strength_0_is_the_layer_itself(kind, name):
    layer, delta, x = layer_of(kind), deltas(kind)[name], picture(kind)
    for call in (lambda layer, x: layer(x), jax.jit(lambda layer, x: layer(x))):
        want = np.asarray(call(layer, x))
        np.testing.assert_array_equal(call(adapted(layer, delta, jnp.float32(0)), x), want)
        np.testing.assert_array_equal(call(merged(layer, delta, jnp.float32(0)), x), want)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_several_act_one_after_another(kind):
    layer, x = layer_of(kind), picture(kind)
    chain = [deltas(kind)[name] for name in ("LoRA", "LoKr", "DoRA", "full", "LoRA")]
    live, once = layer, layer
    for number, delta in enumerate(chain):
        strength = jnp.float32(0.3 + 0.2 * number)
        live, once = adapted(live, delta, strength), merged(once, delta, strength)
        assert isinstance(live, Adapted)
        assert len(live.deltas) == number + 1
        assert not isinstance(live.layer, Adapted)
        assert_close(live(x), once(x), 1e-5)


def test_merging_beneath_adapters():
    layer, x = layer_of("dense"), picture("dense")
    first, second = deltas("dense")["LoRA"], deltas("dense")["LoKr"]
    one = jnp.float32(1)
    mixed = merged(adapted(layer, first, one), second, one)
    assert isinstance(mixed, Adapted)
    assert_close(mixed(x), merged(merged(layer, first, one), second, one)(x), 1e-6)


@pytest.mark.parametrize("kind", ["dense", "convolution"])
def test_a_low_rank_change_is_never_multiplied_out(kind):
    layer, x = layer_of(kind), picture(kind)
    live = adapted(layer, deltas(kind)["LoRA"], jnp.float32(1))
    made = [v.aval.shape for e in equations(jax.make_jaxpr(lambda live, x: live(x))(live, x).jaxpr) for v in e.outvars]
    assert layer.kernel.shape not in made


def equations(jaxpr: Any) -> Any:
    """All equations, those of inner programs instead of their calls."""
    for equation in jaxpr.eqns:
        inner = [value.jaxpr for value in equation.params.values() if hasattr(value, "jaxpr")]
        for each in inner:
            yield from equations(each)
        if not inner:
            yield equation


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["LoRA", "DoRA", "LoHa", "Tucker"])
def test_a_layer_computes_in_its_own_type(dtype, name):
    layer, x = layer_of("convolution"), picture("convolution")
    half = jax.tree.map(lambda a: a.astype(dtype), layer)
    delta, strength = deltas("convolution")[name], jnp.float32(0.5)
    live, once = adapted(half, delta, strength), merged(half, delta, strength)
    assert once.kernel.dtype == dtype
    assert live.kernel is half.kernel
    want = adapted(layer, delta, strength)(x)
    for each in (live, once):
        y = each(x.astype(dtype))
        assert y.dtype == dtype
        assert_close(y.astype(jnp.float32), want, 3e-2)


def test_the_layer_that_went_in_stays_as_it_is():
    layer, delta = layer_of("convolution"), deltas("convolution")["full"]
    names, kernel, bias = dict(vars(layer)), layer.kernel[...], layer.bias[...]
    before = np.array(kernel)
    merged(layer, delta, jnp.float32(1)), adapted(layer, delta, jnp.float32(1))(picture("convolution"))
    assert vars(layer) == names
    assert layer.kernel[...] is kernel
    assert layer.bias[...] is bias
    np.testing.assert_array_equal(kernel, before)
    only_kernel = merged(layer, deltas("convolution")["LoRA"], jnp.float32(1))
    assert only_kernel.bias[...] is bias


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_gradient_is_that_of_merging(kind, name):
    layer, delta, x = layer_of(kind), deltas(kind)[name], picture(kind)
    weigh = draw(*layer(x).shape)

    def loss(change: Any) -> Any:
        return jax.jit(jax.grad(lambda delta, strength: (change(layer, delta, strength)(x) * weigh).sum(), (0, 1)))

    ours, theirs = loss(adapted)(delta, jnp.float32(0.7)), loss(merged)(delta, jnp.float32(0.7))
    for path, got, want in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
        if "scale" in str(path[0]):
            assert got == want == 0
        else:
            assert np.abs(got).max() > 0
            assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


# ---- In a network


ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


@pytest.fixture(scope="module")
def unet() -> UNet:
    return fresh(UNet, from_dict(UNetConfig, SD1 | SMALL))


@pytest.fixture(scope="module")
def inputs() -> tuple[Any, ...]:
    return draw(2, 8, 8, 4), jnp.float32(500), Conditioning(draw(2, 5, 24))


def low_rank(network: nnx.Module, path: str) -> LowRank:
    *sides, inputs, outputs = find(network, path).kernel.shape
    return LowRank(draw(R, inputs, *sides), draw(outputs, R, *[1] * len(sides)), scale=0.2)


PATHS = [
    f"{ATTENTION}.to_q",
    f"{ATTENTION}.to_out.0",
    "conv_in",
    "mid_block.resnets.1.conv2",
    "time_embedding.linear_1",
]


@pytest.fixture(scope="module")
def live(unet) -> Any:
    """live(strength): the network with adapters on some layers."""
    made = {path: low_rank(unet, path) for path in PATHS}
    return lambda strength, change=adapted: replaced(
        unet, {path: change(find(unet, path), delta, jnp.float32(strength)) for path, delta in made.items()}
    )


def test_the_rest_of_a_network_is_shared(unet, live):
    before = dict(jax.tree_util.tree_leaves_with_path(unet))
    for network, changed in ((live(1.0), 0), (live(1.0, merged), len(PATHS))):
        after = {id(leaf) for leaf in jax.tree.leaves(network)}
        assert sum(id(leaf) not in after for leaf in before.values()) == changed
    assert [id(leaf) for leaf in jax.tree.leaves(unet)] == [id(leaf) for leaf in before.values()]
    assert isinstance(find(unet, "conv_in"), nnx.Conv)
    assert isinstance(find(live(1.0), "conv_in"), Adapted)


def test_strengths_are_leaves(live):
    one, other = live(1.0), live(0.25)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one))
    graph, state = nnx.split(one)
    assert jax.tree.structure(nnx.merge(graph, state)) == jax.tree.structure(one)
    assert jax.tree.structure(copied(one)) == jax.tree.structure(one)


@pytest.mark.slow
def test_a_live_network_is_the_merged_one(unet, live, inputs):
    """Also with attention maps, with gradient checkpointing and on several devices."""

    @jax.jit
    def run(network: UNet, x: Any, t: Any, cond: Any) -> Any:
        got = network(x, t, cond, {f"{ATTENTION}"})
        return got.eps, got.taps[ATTENTION]

    want = run(live(0.7, merged), *inputs)
    for ours, theirs in zip(run(live(0.7), *inputs), want, strict=True):
        assert_close(ours, theirs, 1e-5)
    for ours, theirs, away in zip(run(live(0.0), *inputs), run(unet, *inputs), want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.abs(ours - away).max() > 1e-3
    saving = live(0.7)
    saving.remat = True
    assert_close(run(saving, *inputs)[0], want[0], 1e-5)
    leaves, tree = jax.tree.flatten(live(0.7))
    shared = jax.shard_map(
        lambda leaves, *inputs: run(jax.tree.unflatten(tree, leaves), *inputs)[0], mesh=Mesh(jax.devices()[:1], "d"),
        in_specs=(PartitionSpec(), PartitionSpec("d"), PartitionSpec(), PartitionSpec("d")),
        out_specs=PartitionSpec("d"), check_vma=False,
    )  # fmt: skip
    assert_close(shared(leaves, *inputs), want[0], 1e-5)


@pytest.mark.slow
def test_a_bfloat16_network_stays_one(unet, live, inputs):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16) if a.ndim else a, live(0.3))
    assert half.dtype == jnp.bfloat16
    got = jax.jit(lambda network, *inputs: network(*inputs).eps)(half, *inputs)
    assert got.dtype == jnp.float32
    assert_close(got, jax.jit(lambda network, *inputs: network(*inputs).eps)(live(0.3), *inputs), 0.05)


def test_whether_a_network_is_live(unet, live):
    assert is_live(live(0.0))
    assert not is_live(unet)
    assert not is_live(live(1.0, merged))


def test_finding_layers(unet):
    assert find(unet, f"{ATTENTION}.to_out.0").kernel.shape == (16, 16)
    for path in (f"{ATTENTION}.to_out.1", "down_blocks.9.resnets.0", "conv_in.kernel.0", "nothing", "down_blocks.x"):
        assert find(unet, path) is None
