"""Text-to-image training: equal to a torch step, for every family; what is trained, cached, exported."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato.errors import SfumatoError
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.train.denoising import cache
from sfumato.train.objective import Objective
from sfumato.train.recipes.text_to_image import text_to_image

from training import Reference, assert_parity, batch, draws, leaves, our_step

pytestmark = pytest.mark.slow


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_five_steps_are_those_of_the_reference(pair, kind):
    both = pair(kind, small=True)
    blank = None if both.model.options.get("force_zeros_for_empty_prompt") else ""
    reference = Reference(both.pipeline, {"unet": both.pipeline.unet}, blank=blank)
    assert_parity(text_to_image(both.model), reference, draws(5, dropped=(False, True, False)))


@pytest.mark.parity
def test_min_snr_is_the_references(pair):
    both = pair("sd2", small=True)
    reference = Reference(both.pipeline, {"unet": both.pipeline.unet}, min_snr=5.0)
    task = text_to_image(both.model, Objective(both.model.schedule, min_snr=5.0))
    assert_parity(task, reference, draws())


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_text_encoders_are_trained_with_the_unet(pair, kind):
    both = pair(kind, small=True)
    names = ["unet", *both.model.text_encoders]
    reference = Reference(both.pipeline, {name: getattr(both.pipeline, name) for name in names}, blank=None)
    task = text_to_image(both.model, train=names, remat=True)
    assert task.frozen.keys() == {"vae"}
    assert_parity(task, reference, draws())


def test_computing_in_bfloat16_keeps_masters_and_gradients_float32(models):
    model = models("sd1")
    plain, half = text_to_image(model), text_to_image(model, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half.frozen)} == {jnp.dtype("bfloat16")}
    theirs = float(our_step(plain, draws(), gradients=False)(plain.trainable, batch()))
    (loss, _), gradients = our_step(half, draws())(half.trainable, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert float(loss) == pytest.approx(theirs, rel=0.05)
    assert float(loss) != theirs


def test_cached_batches_give_the_same_loss_without_autoencoder_and_text_encoders(models):
    model = models("sd1")
    (drawn,) = draws(dropped=(True, False, False))
    drawn = [dc.replace(drawn, posterior=jnp.zeros_like(drawn.posterior))]  # the mean, as cached
    plain, cached = text_to_image(model), text_to_image(model, cached=True)
    assert cached.frozen.keys() == {"blank"}
    theirs = our_step(plain, drawn, gradients=False)(plain.trainable, batch())
    kept = cache(model, batch())
    assert kept.keys() == {"latents", "context", "conditioning", "sizes"}
    ours = our_step(cached, drawn, gradients=False)(cached.trainable, kept)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    task = text_to_image(model, cached=True, train=["unet", "text_encoder"])
    assert task.frozen == {}
    kept = cache(model, batch(), reads=True)
    assert kept.keys() == {"latents", "text", "conditioning", "sizes"}
    ours = our_step(task, drawn, gradients=False)(task.trainable, kept)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_from_scratch_only_the_configuration_counts(models):
    model = models("sd1")
    empty = dc.replace(model, unet=abstract(UNet, model.unet.config))
    one, same, other = (text_to_image(empty, scratch=["unet"], seed=seed).trainable for seed in (1, 1, 2))
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(same)))
    assert not all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
    assert jax.tree.structure(one) == jax.tree.structure(text_to_image(model).trainable)


def test_masters_share_no_memory_with_the_model(models):
    model = models("sd1")
    trainable = text_to_image(model).trainable
    for path, leaf in leaves(trainable).items():
        assert isinstance(leaf, np.ndarray), path
        assert leaf.dtype == np.float32
    leaves(trainable)["unet", "conv_in", "kernel"][:] = 0
    assert np.any(model.unet.conv_in.kernel[...])


def test_export_is_a_model_that_loads(models, tmp_path):
    model = models("sd1")
    task = text_to_image(model, Objective(dc.replace(model.schedule, prediction_type="v_prediction")))
    changed = jax.tree.map(lambda a: a * 2, task.trainable)
    task.export(changed, tmp_path / "out")
    again = sfumato.load(tmp_path / "out")
    assert again.schedule.prediction_type == "v_prediction"
    np.testing.assert_array_equal(again.unet.conv_in.kernel[...], changed["unet"].conv_in.kernel[...])
    assert again.text_encoders.keys() == model.text_encoders.keys()


def test_rows_without_a_caption_see_the_empty_one_and_zeros_where_the_model_says_so(models):
    for kind, zeros in (("sd1", False), ("sdxl", True)):
        model = models(kind)
        model = dc.replace(model, options={**model.options, "force_zeros_for_empty_prompt": zeros})
        denoising = text_to_image(model).loss.__self__
        data, nets = batch(), {"unet": model.unet, **model.text_encoders}
        collated = jax.tree.map(jnp.asarray, text_to_image(model).collate(data))
        (one,) = draws(dropped=(True, False, True))
        seen = denoising.features(nets, collated, one)
        blank = jax.tree.map(jnp.asarray, text_to_image(model).collate(data | {"text": ["", data["text"][1], ""]}))
        none = dc.replace(one, dropped=jnp.zeros(3, bool))
        wanted = denoising.features(nets, blank, none)
        for ours, theirs in zip(jax.tree.leaves(seen), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(ours[0], 0 * theirs[0] if zeros else theirs[0], rtol=1e-5, atol=1e-5)


def test_bad_input_is_one_sentence(models):
    model = models("sd1")
    with pytest.raises(SfumatoError, match="not text_encoder_2"):
        text_to_image(model, train=["unet", "text_encoder_2"])
    with pytest.raises(SfumatoError, match="not text_encoder"):
        text_to_image(model, scratch=["text_encoder"])
    with pytest.raises(SfumatoError, match="not nothing"):
        text_to_image(model, train=[])
    with pytest.raises(SfumatoError, match="needs text"):
        text_to_image(model).collate({"pixels": batch()["pixels"]})
    with pytest.raises(SfumatoError, match="needs sizes"):
        text_to_image(models("sdxl")).collate({"pixels": batch()["pixels"], "text": ["a"]})
    with pytest.raises(SfumatoError, match="9"):
        text_to_image(models("sd1-inpaint"))


def test_weights_of_rows(models):
    """What prior preservation is made of."""
    task = text_to_image(models("sd1"))
    step = our_step(task, draws(), gradients=False)

    def loss(*weights: float) -> float:
        return float(step(task.trainable, batch() | {"weights": np.array(weights, np.float32)}))

    assert loss(1, 0, 0) + loss(0, 1, 0) + loss(0, 0, 1) == pytest.approx(loss(1, 1, 1), rel=1e-5)


def test_trainable_is_a_pytree_of_arrays(models):
    model = models("sd1")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(text_to_image(model).trainable)]
    assert len({*map(jax.tree_util.keystr, paths)}) == len(nnx.to_flat_state(nnx.state(model.unet, nnx.Param)))


def test_gradient_checkpointing_is_set_where_it_belongs(models):
    model = models("sd1")
    task = text_to_image(model, remat=True)
    assert task.trainable["unet"].remat
    assert task.frozen["text_encoder"].remat
    assert task.frozen["vae"].encoder.remat
    assert not model.unet.remat
