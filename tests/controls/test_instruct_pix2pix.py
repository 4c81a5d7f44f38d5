"""InstructPix2Pix against the torch pipelines and its equation."""

from __future__ import annotations

import dataclasses as dc
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, InstructPix2Pix, SfumatoError, run
from sfumato.types import Prediction

from oracle import assert_close, to_torch
from runs import SIZE, Pair, noise, picture

KINDS = ["instruct-pix2pix", "sdxl-instruct"]


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scales", [(1.5, 7.5), (3.0, 2.0)])
def test_edits_a_picture(kind, scales, saved, loaded):
    pair = Pair(saved(kind)[1], loaded(kind))
    size = {"height": 16, "width": 16} if kind.startswith("sdxl") else {}
    want = pair.theirs(
        image=picture(3), latents=to_torch(noise()), image_guidance_scale=scales[0], guidance_scale=scales[1], **size
    )
    got = pair.ours(controls=[InstructPix2Pix(picture(3), *scales)])
    pair.assert_same(got, want)
    assert np.abs(got - pair.ours(controls=[InstructPix2Pix(picture(4), *scales)])).max() > 0.05


def test_guides_as_equation_3(unchecked):
    outs = {name: noise(seed=seed).astype(np.float64) for seed, name in enumerate(("cond", "image", "uncond"))}
    with jax.enable_x64(True):
        preds = {name: Prediction(jnp.asarray(out), {}) for name, out in outs.items()}
        control = InstructPix2Pix(None, jnp.float64(1.7), jnp.float64(6.0))
        difference, _ = control.guide(None, preds, {}, None, ())  # pyright: ignore[reportArgumentType]
        want = outs["uncond"] + 1.7 * (outs["image"] - outs["uncond"]) + 6.0 * (outs["cond"] - outs["image"])
        assert_close(outs["cond"] + np.asarray(difference), want, 1e-14)


def test_scales_of_one_are_no_guidance(loaded):
    pair = Pair(None, loaded("instruct-pix2pix"))
    plain = pair.ours(controls=[InstructPix2Pix(picture(), 1.0, 1.0)], negative="this is not looked at")
    assert_close(plain, pair.ours(controls=[InstructPix2Pix(picture(), 1.0, 1.0)], negative="nor is this"), 1e-6)


def test_latents_of_a_cosxl_model_are_scaled(loaded, unchecked):
    model = loaded("sdxl-instruct")
    scaled = dc.replace(model, options={**model.options, "is_cosxl_edit": True})
    request = SimpleNamespace(
        model=scaled, batch=1, size=SIZE, noise=jnp.zeros((1, 8, 8, 4)),
        encode_image=lambda pixels: run.encode_image(model.vae, pixels, False),
    )  # fmt: skip
    prepare: Any = InstructPix2Pix(picture()).prepare
    latents = prepare(request).image
    request.model = model
    raw = prepare(request).image
    assert_close(latents, raw * model.vae.config.scaling_factor, 1e-6)


@pytest.mark.parametrize(("kind", "controls", "words"), [
    ("sd1", [InstructPix2Pix(picture())], "needs a model of 8 input channels .*, and this one has 4"),
    ("instruct-pix2pix", [CFG(5.0), InstructPix2Pix(picture())], "InstructPix2Pix and CFG cannot run together"),
    ("instruct-pix2pix", [CFG(5.0)], r"8 input.*|has 4 input channels beside the latents.*add InstructPix2Pix"),
    ("instruct-pix2pix", [InstructPix2Pix(picture(), image_scale=float("nan"))], "image_scale must be a finite number"),
    ("instruct-pix2pix", [InstructPix2Pix([picture()] * 3)], "3 pictures were given for 1"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(kind, controls, words, loaded):
    with pytest.raises(SfumatoError, match=words) as error:
        sfumato.generate(loaded(kind), "make it snow", controls=controls, steps=2, size=(16, 16))
    assert str(error.value).count(". ") == 0
