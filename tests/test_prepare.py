"""A prepared model is the same model to rounding, and whatever runs a model runs it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato.adapters.delta import LowRank
from sfumato.adapters.live import find
from sfumato.adapters.lora import Lora
from sfumato.errors import SfumatoError
from sfumato.models import filtered
from sfumato.models.filtered import Filtered
from sfumato.models.held import held
from sfumato.train.recipes.controlnet import controlnet
from sfumato.train.recipes.text_to_image import text_to_image

from oracle import assert_close
from pictures import drawing
from pipelines import small_net

CONV = "mid_block.resnets.0.conv1"
QUERY = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Kernels of small models count as large."""
    monkeypatch.setattr(filtered, "LEAST", 32)


def draw(model: Any, net: Any, **how: Any) -> Any:
    controls = [sfumato.CFG(3.0), sfumato.ControlNet(net, drawing(16, 16), 0.5)]
    return sfumato.generate(model, "a fox", controls=controls, steps=3, size=(16, 16), **how)


@pytest.mark.slow
def test_generate_draws_the_same(models):
    model, net = models("sd1"), small_net("sd1")
    other = sfumato.prepare(model), sfumato.prepare(net)
    assert held(other[0].unet) is held(other[1]) is Filtered
    want, got = (draw(*pair, output="latents") for pair in ((model, net), other))
    assert_close(got, want, tol=1e-4)
    assert_close(draw(*other, output="latents", devices=jax.devices()[:1]), got, tol=1e-5)
    rows: list[int] = []
    drawn = draw(*other, progress=lambda row, count, preview: rows.append(row))
    assert len(rows) == 3
    assert "adapters" not in drawn[0].metadata


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_gradients_by_the_latents_go_through_it(models, kind):
    """As Attend-and-Excite and Pix2Pix-Zero take them."""
    unet = models(kind).unet
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 4)), jnp.float32)
    width = unet.config.context_dim(0)
    cond = sfumato.Conditioning(jnp.ones((1, 7, width)))
    if kind == "sdxl":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        cond = sfumato.Conditioning(jnp.ones((1, 7, width)), jnp.ones((1, pooled)), jnp.ones((1, 6)))

    @jax.jit
    def back(unet: Any, x: Any) -> Any:
        return jax.grad(lambda x: jnp.square(unet(x, jnp.float32(500), cond).eps).sum())(x)

    assert_close(back(sfumato.prepare(models(kind)).unet, x), back(unet, x), tol=1e-4)


def test_only_what_is_large_is_changed_and_the_rest_is_shared(models):
    model = models("sd1")
    made = sfumato.prepare(model)
    assert made.vae is model.vae
    assert made.text_encoders is model.text_encoders
    assert (made.dtype, made.adapters) == (model.dtype, model.adapters)
    layers = {path: layer for path, layer in nnx.iter_modules(model.unet) if isinstance(layer, nnx.Conv)}
    for path, layer in layers.items():
        other = find(made.unet, ".".join(map(str, path)))
        keeps = layer.kernel.shape[0] == 3 and layer.strides in (1, (1, 1))
        assert isinstance(other, Filtered) == (keeps and "upsamplers" not in path), path
    assert held(model.unet) is None


def test_what_has_nothing_large_or_is_prepared_comes_back_as_it_is(models, monkeypatch):
    made, net = sfumato.prepare(models("sd1")), sfumato.prepare(small_net("sd1"))
    assert sfumato.prepare(made) is made
    assert sfumato.prepare(net) is net
    monkeypatch.setattr(filtered, "LEAST", 2**20)
    assert sfumato.prepare(models("sd1")) is models("sd1")


def test_elsewhere_than_on_processors_a_model_comes_back_as_it_is(models, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert sfumato.prepare(models("sd1")) is models("sd1")


def test_what_is_no_model_is_refused(models, unchecked):
    with pytest.raises(SfumatoError, match=r"A model \(sfumato.load\) or a ControlNet .* can be prepared, not a UNet"):
        sfumato.prepare(models("sd1").unet)


def test_int8_and_prepared_exclude_each_other(models):
    for first, then, form, done in (
        (sfumato.quantize, sfumato.prepare, "int8", "prepared"),
        (sfumato.prepare, sfumato.quantize, "prepared", "quantized"),
    ):
        for kind in (models("sd1"), small_net("sd1")):
            with pytest.raises(SfumatoError, match=f"this model are {form}, so it cannot be {done}; take it as it was"):
                then(first(kind))


def low_rank(model: Any, path: str) -> Lora:
    rng, shape = np.random.default_rng(4), find(model.unet, path).kernel.shape
    down, up = (2, shape[-2], *shape[:-2]), (shape[-1], 2, *[1] * (len(shape) - 2))
    return Lora({"unet": {path: LowRank(*(jnp.asarray(rng.standard_normal(s), jnp.float32) for s in (down, up)))}})


def test_a_lora_is_merged_before_and_live_at_any_time(models):
    model = models("sd1")
    change, width = low_rank(model, CONV), find(model.unet, CONV).kernel.shape[2]
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 4, 4, width)), jnp.float32)
    want = find(change.apply(model).unet, CONV)(x)
    for made in (
        sfumato.prepare(change.apply(model)),
        sfumato.prepare(change.apply(model, live=True)),
        change.apply(sfumato.prepare(model), live=True),
    ):
        assert held(made.unet) is Filtered
        assert_close(find(made.unet, CONV)(x), want, tol=1e-4)


def test_merging_into_prepared_kernels_is_refused_and_beside_them_it_is_not(models):
    model = sfumato.prepare(models("sd1"))
    with pytest.raises(SfumatoError, match="merged into prepared kernels: apply it first and prepare then, or apply"):
        low_rank(models("sd1"), CONV).apply(model)
    done = low_rank(models("sd1"), QUERY).apply(model)
    before, after = (find(each.unet, QUERY).kernel[...] for each in (model, done))
    assert np.abs(before - after).max() > 0


def test_saving_and_training_are_refused(models, tmp_path):
    model, net = sfumato.prepare(models("sd1")), sfumato.prepare(small_net("sd1"))
    for made in (model, net):
        with pytest.raises(SfumatoError, match="kernels of this model are prepared, which the format has no place for"):
            sfumato.save(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SfumatoError, match="kernels of this model are prepared and cannot be trained"):
        text_to_image(model)
    with pytest.raises(SfumatoError, match="kernels of this model are prepared and cannot be trained"):
        controlnet(models("sd1"), net)
