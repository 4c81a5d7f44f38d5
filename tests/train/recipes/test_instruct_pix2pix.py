"""InstructPix2Pix training: starts as the model it comes from, equal to a torch step."""

from __future__ import annotations

import copy
import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato.errors import SfumatoError
from sfumato.train.denoising import cache
from sfumato.train.recipes.instruct_pix2pix import instruct_pix2pix, widened
from sfumato.train.recipes.text_to_image import text_to_image

from oracle import to_torch
from training import Reference, assert_parity, batch, draws, leaves, our_step

pytestmark = pytest.mark.slow
DROPPED = {"dropped": (True, False, False), "dropped_image": (False, True, False)}


def wide(unet: Any) -> Any:
    """The torch UNet with four channels more that start at zero, as diffusers' training script makes it."""
    import torch

    unet, old = copy.deepcopy(unet), unet.conv_in
    unet.conv_in = torch.nn.Conv2d(8, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        unet.conv_in.weight.zero_()
        unet.conv_in.weight[:, :4] = old.weight
        unet.conv_in.bias.copy_(old.bias)
    return unet


def seen(reference: Reference, data: Any, drawn: Any, noisy: Any, t: Any, arguments: Any) -> dict[str, Any]:
    """The latents of the picture before, without the scaling factor, in rows where it is there."""
    picture = reference.part("vae").encode(2 * to_torch(data["conditioning"]) - 1).latent_dist.mode()
    return {"channels": [picture * to_torch(~np.asarray(drawn.dropped_image))[:, None, None, None]]}


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_five_steps_are_those_of_the_reference(pair, kind):
    both = pair(kind, small=True)
    blank = None if both.model.options.get("force_zeros_for_empty_prompt") else ""
    reference = Reference(both.pipeline, {"unet": wide(both.pipeline.unet)}, blank=blank, extend=seen)
    assert_parity(instruct_pix2pix(both.model), reference, draws(5, **DROPPED))


def test_the_start_is_the_model_it_comes_from(models):
    model, drawn = models("sd1"), draws(**DROPPED)
    task, plain = instruct_pix2pix(model), text_to_image(model)
    (loss, _), gradients = our_step(task, drawn)(task.trainable, batch())
    wanted = our_step(plain, drawn, gradients=False)(plain.trainable, batch())
    assert float(loss) == pytest.approx(float(wanted), rel=1e-5)
    assert np.any(leaves(gradients)["unet", "conv_in", "kernel"][:, :, 4:])


def test_cached_batches_give_the_same_loss(models):
    model, (drawn,) = models("sd1"), draws(**DROPPED)
    drawn = dc.replace(drawn, posterior=jnp.zeros_like(drawn.posterior))  # the mean, as cached
    plain, cached = instruct_pix2pix(model), instruct_pix2pix(model, cached=True)
    kept = cache(model, batch(), edits=True)
    assert cached.frozen.keys() == {"blank"}
    assert kept.keys() == {"latents", "context", "channels", "sizes"}
    widened = jax.tree.map(lambda a: a + np.float32(0.01), plain.trainable)  # so that the picture before has an effect
    wanted = our_step(plain, [drawn], gradients=False)(widened, batch())
    run = our_step(cached, [drawn], gradients=False)
    assert float(run(widened, kept)) == pytest.approx(float(wanted), rel=1e-5)
    assert float(run(widened, kept | {"channels": 0 * kept["channels"]})) != pytest.approx(float(wanted), rel=1e-3)
    cosxl = dc.replace(model, options={**model.options, "is_cosxl_edit": True})
    scaled = cache(cosxl, batch(), edits=True)["channels"]
    np.testing.assert_allclose(scaled, kept["channels"] * model.vae.config.scaling_factor, rtol=1e-5)


def test_widening_keeps_what_is_there(models):
    unet = models("sd1").unet
    kernel = np.asarray(widened(unet, 8).conv_in.kernel[...])
    np.testing.assert_array_equal(kernel[:, :, :4], unet.conv_in.kernel[...])
    assert not kernel[:, :, 4:].any()
    same = widened(widened(unet, 8), 8)
    np.testing.assert_array_equal(same.conv_in.kernel[...], kernel)
    assert same.config.in_channels == 8


def test_dropout_is_that_of_the_paper(models):
    objective = instruct_pix2pix(models("sd1")).loss.__self__.objective
    drawn = objective.draw(jax.random.key(0), (40_000, 1, 1, 1))
    text, picture = np.asarray(drawn.dropped), np.asarray(drawn.dropped_image)
    for rows in (text & ~picture, picture & ~text, text & picture):
        assert rows.mean() == pytest.approx(0.05, abs=0.005)


def test_export_edits_pictures(models, tmp_path):
    model = models("sd1")
    task = instruct_pix2pix(model)
    task.export(task.trainable, tmp_path / "out")
    again = sfumato.load(tmp_path / "out")
    assert again.unet.config.in_channels == 8
    edit = sfumato.InstructPix2Pix(np.zeros((16, 16, 3), np.uint8))
    pictures = sfumato.generate(again, "make it red", controls=[edit], steps=1, size=(16, 16), output="latents")
    assert np.isfinite(np.asarray(pictures)).all()


def test_bad_input_is_one_sentence(models):
    with pytest.raises(SfumatoError, match="4 or 8 input channels"):
        instruct_pix2pix(models("sd1-inpaint"))
    with pytest.raises(SfumatoError, match="needs conditioning"):
        instruct_pix2pix(models("sd1")).collate({"pixels": batch()["pixels"], "text": ["a"]})
    with pytest.raises(SfumatoError, match="needs channels"):
        instruct_pix2pix(models("sd1"), cached=True).collate({**batch(), "latents": 0, "context": 0})


def test_a_model_of_eight_channels_goes_on(models):
    model = models("instruct-pix2pix")
    trained = instruct_pix2pix(dc.replace(model)).trainable["unet"]
    np.testing.assert_array_equal(trained.conv_in.kernel[...], model.unet.conv_in.kernel[...])
