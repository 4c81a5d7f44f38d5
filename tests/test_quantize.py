"""A quantized model is the same model to a percent, smaller, and whatever runs a model runs it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato.adapters.delta import LowRank
from sfumato.adapters.live import find, replaced
from sfumato.adapters.lora import Lora
from sfumato.errors import SfumatoError
from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.held import held
from sfumato.models.int8 import Int8
from sfumato.models.unet import UNet
from sfumato.quantize import KEPT, quantized
from sfumato.train.recipes.controlnet import controlnet
from sfumato.train.recipes.instruct_pix2pix import instruct_pix2pix
from sfumato.train.recipes.lora import lora
from sfumato.train.recipes.text_to_image import text_to_image
from sfumato.train.recipes.textual_inversion import textual_inversion
from sfumato.types import Conditioning

from models.tiny import CONTROLNETS, UNETS
from oracle import assert_close, fresh
from pictures import drawing
from pipelines import small_net

QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def unet(kind: str) -> UNet:
    return fresh(UNet, from_dict(UNetConfig, UNETS[kind]))


def restored(network: Any) -> Any:
    """The ordinary network that an int8 one stands for."""
    one = jnp.zeros((1, 1))
    layers = {".".join(map(str, path)): module for path, module in nnx.iter_modules(network)}
    return replaced(network, {p: layer.restored(one) for p, layer in layers.items() if isinstance(layer, Int8)})


def inputs(config: Any) -> tuple[jax.Array, jax.Array, Conditioning]:
    rng = np.random.default_rng(1)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    ids = (config.projection_class_embeddings_input_dim or 0) - 20
    pooled = config.addition_embed_type == "text_time"
    cond = Conditioning(
        draw(2, 7, config.context_dim(0)), draw(2, 20) if pooled else None,
        draw(2, ids // config.addition_time_embed_dim) if pooled else None,
    )  # fmt: skip
    return draw(2, 8, 8, config.in_channels), jnp.float32(500), cond


def off(got: Any, want: Any) -> float:
    return float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_a_unet_is_near_the_one_it_was_and_equal_to_the_one_it_stands_for(kind):
    """Rounding to steps of s = max |w| / 127 is off by s / sqrt(12) on average. Of normal numbers with a largest of 3
    deviations that is 0.7 % of a layer's output. Layers are off independently, and each adds to a sum that came by
    the others: three layers' worth at most."""
    before = unet(kind)
    made, run = quantized(before), jax.jit(lambda net, *at: net(*at).eps)
    assert made.dtype == jnp.float32
    got = run(made, *(at := inputs(before.config)))
    assert_close(got, run(restored(made), *at), tol=1e-5)
    assert 1e-4 < off(got, run(before, *at)) < 0.02


@pytest.mark.slow
def test_a_controlnet_is_near_the_one_it_was():
    before = fresh(ControlNet, from_dict(ControlNetConfig, CONTROLNETS["sd1"]))
    made, picture = sfumato.quantize(before), jnp.asarray(np.random.default_rng(2).uniform(size=(2, 64, 64, 3)))
    run = jax.jit(lambda net, x, t, cond: net(x, t, cond, picture.astype(jnp.float32)).mid)
    got = run(made, *(at := inputs(before.config)))
    assert_close(got, run(restored(made), *at), tol=1e-5)
    assert 1e-4 < off(got, run(before, *at)) < 0.02


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_every_kernel_but_the_first_and_last_takes_a_byte_a_number(kind):
    before = unet(kind)
    made, saved, kept = quantized(before), 0, []
    for path, layer in nnx.iter_modules(before):
        if not isinstance(layer, nnx.Linear | nnx.Conv):
            continue
        if path[0] in KEPT:
            kept.append(find(made, ".".join(map(str, path))))
        else:
            saved += 3 * layer.kernel.size - 4 * layer.kernel.shape[-1]
    size = {name: sum(a.nbytes for a in jax.tree.leaves(net)) for name, net in (("before", before), ("now", made))}
    assert size["now"] == size["before"] - saved
    assert size["now"] < 0.4 * size["before"]
    assert all(isinstance(layer, nnx.Linear | nnx.Conv) for layer in kept)
    assert before.dtype == made.dtype == jnp.float32


def test_all_that_reads_or_draws_is_quantized_and_the_rest_is_shared(models):
    model = models("sdxl")
    made = sfumato.quantize(model)
    assert {held(each) for each in (made.unet, *made.text_encoders.values())} == {Int8}
    assert {held(each) for each in (model.unet, *model.text_encoders.values())} == {None}
    assert made.vae is model.vae
    assert (made.dtype, made.adapters) == (model.dtype, (*model.adapters, "int8 weights"))
    for name, encoder in made.text_encoders.items():
        table = encoder.text_model.embeddings.token_embedding.embedding
        assert table[...] is model.text_encoders[name].text_model.embeddings.token_embedding.embedding[...]


def test_what_is_int8_comes_back_as_it_is(models):
    made = sfumato.quantize(models("sd1"))
    assert sfumato.quantize(made) is made
    net = sfumato.quantize(small_net("sd1"))
    assert sfumato.quantize(net) is net


def test_what_is_no_model_is_refused(models, unchecked):
    with pytest.raises(SfumatoError, match=r"A model \(sfumato.load\) or a ControlNet .* not a UNet"):
        sfumato.quantize(models("sd1").unet)


@pytest.mark.slow
def test_generate_with_a_controlnet_is_near_what_it_was(models):
    model, net, picture = models("sd1"), small_net("sd1"), drawing(16, 16)

    def draw(model: Any, net: Any, **how: Any) -> Any:
        controls = [sfumato.CFG(3.0), sfumato.ControlNet(net, picture, 0.5)]
        return sfumato.generate(model, "a fox", controls=controls, steps=3, size=(16, 16), **how)

    small = sfumato.quantize(model), sfumato.quantize(net)
    got, want = (draw(*pair, output="latents") for pair in (small, (model, net)))
    assert 1e-4 < off(got, want) < 0.1, "errors of a step carry over to the next"
    on = draw(*small, output="latents", devices=jax.devices()[:1])
    assert_close(on, got, tol=1e-5)
    rows: list[int] = []
    drawn = draw(*small, progress=lambda row, count, preview: rows.append(row))
    assert len(rows) == 3
    assert drawn[0].metadata["adapters"] == ["int8 weights"]


def low_rank(model: Any) -> Lora:
    rng = np.random.default_rng(4)
    width = find(model.unet, QUERY).kernel.shape[0]
    down, up = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((2, width), (width, 2)))
    return Lora({"unet": {QUERY: LowRank(down, up)}})


def test_a_lora_is_merged_before_and_live_at_any_time(models):
    model = models("sd1")
    change = low_rank(model)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 3, find(model.unet, QUERY).kernel.shape[0])))
    want = find(change.apply(model).unet, QUERY)(x.astype(jnp.float32))
    for made in (
        sfumato.quantize(change.apply(model)),
        sfumato.quantize(change.apply(model, live=True)),
        change.apply(sfumato.quantize(model), live=True),
    ):
        assert held(made.unet) is Int8
        assert 1e-5 < off(find(made.unet, QUERY)(x.astype(jnp.float32)), want) < 0.02


@pytest.mark.parametrize("live_before", [False, True])
def test_merging_into_int8_is_refused(models, live_before):
    model = sfumato.quantize(models("sd1"))
    change = low_rank(model)
    model = change.apply(model, live=True) if live_before else model
    with pytest.raises(SfumatoError, match="cannot be merged into int8 kernels: apply it first and quantize then, or"):
        change.apply(model, 0.5)


def test_saving_is_refused(models, tmp_path):
    for made in (sfumato.quantize(models("sd1")), sfumato.quantize(small_net("sd1"))):
        with pytest.raises(SfumatoError, match="kernels of this model are int8, which the format has no place for"):
            sfumato.save(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("train", [text_to_image, lora, controlnet, instruct_pix2pix, textual_inversion])
def test_training_is_refused(models, train):
    with pytest.raises(SfumatoError, match="kernels of this model are int8 and cannot be trained"):
        train(sfumato.quantize(models("sd1")), *(["<fox>"] if train is textual_inversion else []))


def test_training_an_int8_controlnet_is_refused(models):
    with pytest.raises(SfumatoError, match="kernels of this model are int8 and cannot be trained"):
        controlnet(models("sd1"), sfumato.quantize(small_net("sd1")))
