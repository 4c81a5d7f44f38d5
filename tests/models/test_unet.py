"""The UNet against the torch reference, family by family, and its own laws."""

from __future__ import annotations

import dataclasses as dc
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.errors import SfumatoError
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.unet import UNet
from sfumato.types import Conditioning, Residuals

from models.tiny import UNETS
from oracle import assert_close, fill_from_torch, fresh, from_torch, seeded, to_torch


def inputs(config: UNetConfig, rows: int = 2, size: tuple[int, int] = (8, 8), seed: int = 0) -> dict:
    """Random inputs of every kind that the configuration asks for, as numpy."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    out = {"x": draw(rows, *size, 4), "context": draw(rows, 7, config.context_dim(0)), "t": np.float32(501)}
    if config.in_channels > 4:
        out["channels"] = draw(rows, *size, config.in_channels - 4)
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim
        ids = (width - 20) // config.addition_time_embed_dim
        out |= {"pooled": draw(rows, 20), "time_ids": 100 * np.abs(draw(rows, ids))}
    if config.time_cond_proj_dim:
        out["guidance"] = draw(rows, config.time_cond_proj_dim)
    return out


def conditioning(values: dict) -> Conditioning:
    fields = {field.name for field in dc.fields(Conditioning)}
    return Conditioning(**{k: jax.tree.map(jnp.asarray, v) for k, v in values.items() if k in fields})


@functools.partial(jax.jit, static_argnames="taps")
def evaluate(unet: UNet, x, t, cond: Conditioning, taps=frozenset()):
    return unet(x, t, cond, taps)


def run(unet: UNet, values: dict, taps=frozenset()):
    return evaluate(unet, jnp.asarray(values["x"]), jnp.asarray(values["t"]), conditioning(values), taps)


@jax.jit
def _encode(unet: UNet, x, t, cond: Conditioning):
    emb = unet.embed(unet.config, t, cond)
    skips, mid, _ = unet.encode(unet.conv_in(x), emb, cond.context)
    return skips, mid


def encode(unet: UNet, values: dict):
    """The skip connections and the output of the middle block."""
    return _encode(unet, jnp.asarray(values["x"]), jnp.full(len(values["x"]), values["t"]), conditioning(values))


def added_conditions(values: dict):
    """SDXL's inputs under the reference's names."""
    if "pooled" not in values:
        return None
    return {"text_embeds": to_torch(values["pooled"]), "time_ids": to_torch(values["time_ids"])}


def run_torch(unet, values: dict, x=None, **kwargs):
    import torch

    x = to_torch(values["x"]) if x is None else x
    if "channels" in values:
        x = torch.cat([x, to_torch(values["channels"])], dim=1)
    guidance = to_torch(values["guidance"]) if "guidance" in values else None
    return unet(
        x, torch.tensor(float(values["t"])), to_torch(values["context"]), timestep_cond=guidance,
        added_cond_kwargs=added_conditions(values), **kwargs,
    ).sample  # fmt: skip


@functools.cache
def pair(name: str):
    """(our UNet, the reference) with the same random weights."""
    from diffusers import UNet2DConditionModel

    theirs = seeded(lambda: UNet2DConditionModel(**UNETS[name]))
    config = from_dict(UNetConfig, UNETS[name])
    return fill_from_torch(UNet, config, theirs), theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", UNETS)
def test_forward_equals_the_reference(name):
    ours, theirs = pair(name)
    values = inputs(ours.config)
    assert_close(run(ours, values).eps, from_torch(run_torch(theirs, values)))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_every_block_equals_the_reference(name):
    ours, theirs = pair(name)
    values = inputs(ours.config)
    seen = {}
    for path, module in theirs.named_modules():
        if (path.startswith(("down_blocks", "mid_block", "up_blocks")) and path.count(".") == 3) or path == "mid_block":
            module.register_forward_hook(lambda m, i, o, path=path: seen.__setitem__(path, o))
    run_torch(theirs, values)
    skips, mid = encode(ours, values)
    assert_close(mid, from_torch(seen["mid_block"]))
    at = 1
    for i, block in enumerate(ours.down_blocks):
        for j in range(len(block.resnets)):
            kind = "attentions" if hasattr(block, "attentions") else "resnets"
            value = seen[f"down_blocks.{i}.{kind}.{j}"]
            assert_close(skips[at], from_torch(value[0] if isinstance(value, tuple) else value))
            at += 1
        at += hasattr(block, "downsamplers")
    assert at == len(skips)


@pytest.mark.parity
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (5, 5)])
def test_sizes_that_do_not_halve_evenly(size):
    ours, theirs = pair("sdxl")
    values = inputs(ours.config, size=size)
    assert_close(run(ours, values).eps, from_torch(run_torch(theirs, values)))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("remat", [False, True])
def test_gradient_to_the_latents_equals_the_reference(name, remat):
    import torch

    ours, theirs = pair(name)
    values = inputs(ours.config)
    weight = np.random.default_rng(1).standard_normal(values["x"].shape).astype(np.float32)
    x = to_torch(values["x"]).requires_grad_()
    (run_torch(theirs, values, x) * to_torch(weight)).sum().backward()
    assert isinstance(x.grad, torch.Tensor)
    ours = nnx.clone(ours)
    ours.remat = remat
    loss = lambda m, x: (run(m, values | {"x": x}).eps * weight).sum()  # noqa: E731
    assert_close(jax.jit(jax.grad(loss, argnums=1))(ours, jnp.asarray(values["x"])), from_torch(x.grad))


@pytest.mark.parity
def test_one_time_a_row():
    import torch

    ours, theirs = pair("sd1")
    values = inputs(ours.config)
    t = np.array([3.0, 950.0], np.float32)
    want = theirs(to_torch(values["x"]), torch.tensor(t), to_torch(values["context"])).sample
    assert_close(run(ours, values | {"t": t}).eps, from_torch(want))


@pytest.mark.parity
def test_residuals_are_added_as_the_reference_does():
    ours, theirs = pair("sd1")
    values = inputs(ours.config)
    skips, mid = encode(ours, values)
    rng = np.random.default_rng(2)
    draw = lambda a: rng.standard_normal(a.shape).astype(np.float32)  # noqa: E731
    down, middle = [draw(s) for s in skips], draw(mid)
    cond = dc.replace(conditioning(values), residuals=Residuals(tuple(map(jnp.asarray, down)), jnp.asarray(middle)))
    got = evaluate(ours, jnp.asarray(values["x"]), jnp.asarray(values["t"]), cond).eps
    want = run_torch(
        theirs, values, down_block_additional_residuals=[to_torch(d) for d in down],
        mid_block_additional_residual=to_torch(middle),
    )  # fmt: skip
    assert_close(got, from_torch(want))


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["attn1", "attn2"])
def test_tapped_maps_equal_the_reference(kind):
    ours, theirs = pair("sdxl")
    values = inputs(ours.config)
    path = f"mid_block.attentions.0.transformer_blocks.1.{kind}"
    layer, seen = theirs.get_submodule(path), {}

    class Keep:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, **_):
            context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = (
                attn.head_to_batch_dim(f(y))
                for f, y in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
            )
            seen["map"] = attn.get_attention_scores(q, k)
            return attn.to_out[0](attn.batch_to_head_dim(seen["map"] @ v))

    layer.set_processor(Keep())
    want = run_torch(theirs, values)
    got = run(ours, values, taps=frozenset({path}))
    assert_close(got.taps[path].reshape(seen["map"].shape), seen["map"].detach())
    assert_close(got.eps, from_torch(want))


def new(name: str = "sd1") -> UNet:
    return fresh(UNet, from_dict(UNetConfig, UNETS[name]))


@pytest.mark.parametrize("name", ["sd1", "sdxl", "no-attention-below"])
def test_every_attention_path_can_be_tapped_and_changes_nothing(name):
    unet = new(name)
    values = inputs(unet.config)
    paths = unet.attention_paths()
    tapped = run(unet, values, taps=frozenset(paths))
    assert set(tapped.taps) == set(paths)
    for path, value in tapped.taps.items():
        np.testing.assert_allclose(value.sum(-1), 1, rtol=1e-5, err_msg=path)
        assert value.shape[-1] == (7 if path.endswith("attn2") else value.shape[-2])
    np.testing.assert_allclose(tapped.eps, run(unet, values).eps, atol=1e-5)


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "no-attention-below"])
def test_what_was_heard_before_changes_nothing(name, tapped):
    unet = new(name)
    values = inputs(unet.config)
    layers = {path for path in unet.attention_paths() if path.endswith(".attn2")}
    heard = unet.hear(jnp.asarray(values["context"]))
    assert set(heard) == layers
    taps = frozenset(unet.attention_paths() if tapped else ())
    got, want = (run(unet, values | more, taps) for more in ({"heard": heard}, {}))
    np.testing.assert_allclose(got.eps, want.eps, atol=1e-5)
    assert set(got.taps) == set(want.taps) == taps
    for path in taps:
        np.testing.assert_allclose(got.taps[path], want.taps[path], atol=1e-5, err_msg=path)
    silent = {path: tuple(jnp.zeros_like(each) for each in keys) for path, keys in heard.items()}
    assert np.abs(run(unet, values | {"heard": silent}, taps).eps - want.eps).max() > 1e-3


def test_bfloat16_is_finite_and_near_float32():
    unet = new("sdxl")
    values = inputs(unet.config)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), unet)
    assert half.dtype == jnp.bfloat16
    got, want = run(half, values).eps, run(unet, values).eps
    assert got.dtype == jnp.float32
    assert np.abs(got - want).max() < 0.1 * (want.max() - want.min())


def test_gradient_checkpointing_keeps_less_and_changes_no_number():
    # Counted in what the forward pass hands to the backward pass: XLA's CPU backend undoes recomputation when it
    # compiles, GPU and TPU do not.
    unet = new("sd1")
    values = inputs(unet.config, size=(32, 32))
    loss = lambda m: (run(m, values).eps ** 2).mean()  # noqa: E731
    kept, grads = [], []
    for unet.remat in (False, True):
        residuals = jax.tree.leaves(jax.eval_shape(lambda m: jax.vjp(loss, m)[1], unet))
        kept.append(sum(r.size for r in residuals))
        grads.append(jax.tree.leaves(jax.grad(loss)(unet)))
    for a, b in zip(*grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize(
    ("changes", "taps", "words"),
    [
        ({"channels": np.zeros((2, 8, 8, 5), np.float32)}, (), "takes 4 input channels"),
        ({}, ("mid_block.attn1",), "no attention layer 'mid_block.attn1'"),
    ],
)
def test_what_the_network_does_not_have_is_refused(changes, taps, words):
    unet = new()
    with pytest.raises(SfumatoError, match=words):
        run(unet, inputs(unet.config) | changes, taps=frozenset(taps))


def test_an_sdxl_network_without_pooled_features_is_refused():
    unet = new("sdxl")
    values = inputs(unet.config)
    del values["pooled"], values["time_ids"]
    with pytest.raises(SfumatoError, match="SDXL"):
        run(unet, values)
