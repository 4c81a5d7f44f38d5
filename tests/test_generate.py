"""Whole runs against the torch pipelines, on tiny models with the same noise."""

from __future__ import annotations

import dataclasses as dc

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.schedule import Schedule
from sfumato.types import Window

from oracle import assert_close, to_torch
from pipelines import nets

PROMPT, NEGATIVE = "a red fox in the snow", "blurry"
SIZE = (16, 16)
"""Pixels; the tiny autoencoder halves them."""
TOLERANCE = 2e-3


def noise(shape=(1, 8, 8, 4), seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def picture(seed: int = 1, size: tuple[int, int] = SIZE) -> Image.Image:
    """Smooth colours, so that resizing and rounding matter little."""
    small = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def mask(size: tuple[int, int] = SIZE) -> Image.Image:
    """White on the right half."""
    array = np.zeros((size[1], size[0]), np.uint8)
    array[:, size[0] // 2 :] = 255
    return Image.fromarray(array)


def theirs(pipeline, prompt=PROMPT, **kwargs):
    """The pipeline's final latents, channel-last."""
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "negative_prompt": NEGATIVE} | kwargs
    out = pipeline(prompt, output_type="latent", **settings).images
    return np.moveaxis(out.detach().numpy(), 1, -1)


def ours(model, prompt=PROMPT, **kwargs):
    settings = {"steps": 4, "controls": (sfumato.CFG(5.0),), "negative": NEGATIVE, "size": SIZE} | kwargs
    return np.asarray(sfumato.generate(model, prompt, output="latents", **settings))


@pytest.fixture(autouse=True)
def _mean_of_the_posterior(monkeypatch):
    """The reference draws from the posterior of the autoencoder; we take its mean."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_text_to_image(kind, saved, loaded):
    pipeline = saved(kind)[1]
    want = theirs(pipeline, latents=to_torch(noise()), height=16, width=16)
    assert_close(ours(loaded(kind), latents=noise()), want, TOLERANCE)


@pytest.mark.parity
def test_decoded_pictures_and_several_prompts(saved, loaded):
    pipeline, model = saved("sd1")[1], loaded("sd1")
    prompts, start = [PROMPT, "a blue bird"], noise((2, 8, 8, 4))
    want = pipeline(
        prompts, negative_prompt=[NEGATIVE, "dark"], latents=to_torch(start), num_inference_steps=3,
        guidance_scale=5.0, output_type="np", height=16, width=16,
    ).images  # fmt: skip
    got = sfumato.generate(
        model, prompts, negative=[NEGATIVE, "dark"], latents=start, steps=3, controls=[sfumato.CFG(5.0)], size=SIZE
    )
    for a, b in zip(got, want, strict=True):
        assert np.abs(a.array.astype(int) - np.round(b * 255)).max() <= 2


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_no_guidance_and_rescaled_guidance(kind, saved, loaded):
    pipeline, model = saved(kind)[1], loaded(kind)
    start = to_torch(noise())
    want = theirs(pipeline, latents=start, guidance_scale=1.0, negative_prompt=None, height=16, width=16)
    assert_close(ours(model, latents=noise(), controls=(), negative=None), want, TOLERANCE)
    want = theirs(pipeline, latents=start, guidance_rescale=0.7, height=16, width=16)
    assert_close(ours(model, latents=noise(), controls=[sfumato.CFG(5.0, rescale=0.7)]), want, TOLERANCE)


@pytest.mark.parity
def test_sdxl_without_a_negative_prompt(saved, loaded):
    """The checkpoint says force_zeros_for_empty_prompt."""
    pipeline, model = saved("sdxl")[1], loaded("sdxl")
    assert model.options["force_zeros_for_empty_prompt"]
    want = theirs(pipeline, latents=to_torch(noise()), negative_prompt=None, height=16, width=16)
    assert_close(ours(model, latents=noise(), negative=None), want, TOLERANCE)


def image_to_image(pipeline, monkeypatch, start, **kwargs):
    """The reference's image-to-image, with its noise given."""
    import importlib

    module = importlib.import_module(type(pipeline).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: to_torch(start))
    return theirs(pipeline, **kwargs)


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name"), [("sd1", "StableDiffusionImg2ImgPipeline"),
                                            ("sdxl", "StableDiffusionXLImg2ImgPipeline")])  # fmt: skip
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(kind, name, strength, saved, loaded, monkeypatch):
    import diffusers

    pipeline = getattr(diffusers, name).from_pipe(saved(kind)[1])
    pipeline.set_progress_bar_config(disable=True)
    settings = {"image": picture(), "strength": strength}
    want = image_to_image(pipeline, monkeypatch, noise(), num_inference_steps=8, **settings)
    assert_close(ours(loaded(kind), latents=noise(), steps=8, **settings), want, TOLERANCE)


@pytest.mark.parity
def test_the_refiner_takes_over(saved, loaded):
    base, refiner = saved("sdxl")[1], saved("sdxl-refiner")[1]
    middle = theirs(base, latents=to_torch(noise()), num_inference_steps=10, denoising_end=0.7, height=16, width=16)
    got = ours(loaded("sdxl"), latents=noise(), steps=10, stop=0.7)
    assert_close(got, middle, TOLERANCE)
    want = theirs(refiner, image=to_torch(middle), num_inference_steps=10, denoising_start=0.7, height=16, width=16)
    assert_close(ours(loaded("sdxl-refiner"), latents=middle, steps=10, start=0.7), want, TOLERANCE)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd1-inpaint"])
def test_inpainting(kind, saved, loaded, monkeypatch):
    import diffusers

    pipeline = saved(kind)[1]
    if kind == "sd1":
        parts = {k: v for k, v in pipeline.components.items() if k != "image_encoder"}
        pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
    want = image_to_image(
        pipeline, monkeypatch, noise(), image=picture(), mask_image=mask(), height=16, width=16, strength=1.0
    )
    got = ours(loaded(kind), latents=noise(), controls=[sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask())])
    assert_close(got, want, TOLERANCE)


@pytest.mark.parity
def test_the_picture_outside_the_mask_comes_back_exactly(loaded):
    got = sfumato.generate(
        loaded("sd1"), PROMPT, steps=2, size=SIZE, controls=[sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask())]
    )
    known = np.asarray(picture())
    np.testing.assert_array_equal(got[0].array[:, :8], known[:, :8])
    assert (got[0].array[:, 8:] != known[:, 8:]).any()


def control_pipeline(saved, kind: str, net):
    import diffusers

    name = {"sd1": "StableDiffusionControlNetPipeline", "sdxl": "StableDiffusionXLControlNetPipeline"}[kind]
    pipeline = getattr(diffusers, name).from_pipe(saved(kind)[1], controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    # The tiny autoencoder halves a picture where the reference's control pictures are taken to shrink eightfold.
    return pipeline


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("guess", [False, True])
def test_controlnet(kind, guess, saved, loaded):
    ((net, own),) = nets(kind)
    want = theirs(
        control_pipeline(saved, kind, net), image=picture(3), latents=to_torch(noise()), height=16, width=16,
        controlnet_conditioning_scale=0.8, guess_mode=guess,
    )  # fmt: skip
    control = sfumato.ControlNet(own, picture(3), scale=0.8, guess=guess)
    got = ours(loaded(kind), latents=noise(), controls=[sfumato.CFG(5.0), control])
    assert_close(got, want, TOLERANCE)
    plain = ours(loaded(kind), latents=noise())
    assert np.abs(got - plain).max() > 0.05, "the ControlNet did nothing"


@pytest.mark.parity
def test_two_controlnets_in_windows(saved, loaded):
    pairs = nets("sd1", 2)
    want = theirs(
        control_pipeline(saved, "sd1", [net for net, _ in pairs]), image=[picture(3), picture(4)],
        latents=to_torch(noise()), height=16, width=16, controlnet_conditioning_scale=[0.8, 0.5],
        control_guidance_start=[0.0, 0.2], control_guidance_end=[0.6, 1.0], num_inference_steps=5,
    )  # fmt: skip
    controls = [
        sfumato.CFG(5.0),
        sfumato.ControlNet(pairs[0][1], picture(3), 0.8, Window(0.0, 0.6)),
        sfumato.ControlNet(pairs[1][1], picture(4), 0.5, Window(0.2, 1.0)),
    ]
    assert_close(ours(loaded("sd1"), latents=noise(), controls=controls, steps=5), want, TOLERANCE)


SCHEDULERS = {
    "DDIMScheduler": {}, "PNDMScheduler": {"skip_prk_steps": True}, "EulerDiscreteScheduler": {},
    "HeunDiscreteScheduler": {}, "DPMSolverMultistepScheduler": {}, "UniPCMultistepScheduler": {},
    "LMSDiscreteScheduler": {}, "KDPM2DiscreteScheduler": {}, "DEISMultistepScheduler": {},
}  # fmt: skip
"""Deterministic samplers; those with noise are compared sampler by sampler in tests/samplers."""

RUNS = [("sd1", name) for name in SCHEDULERS] + [
    (kind, name) for kind in ("sd2", "sdxl") for name in list(SCHEDULERS)[:6]
    # The reference mixes velocities of different times, we mix noise: see sfumato.samplers.pndm.
    if (kind, name) != ("sd2", "PNDMScheduler")
]  # fmt: skip


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_samplers_in_whole_runs(kind, name, saved, loaded):
    import diffusers

    pipeline = saved(kind)[1]
    before = pipeline.scheduler
    pipeline.scheduler = getattr(diffusers, name).from_config(before.config, **SCHEDULERS[name])
    try:
        config = dict(pipeline.scheduler.config) | {"_class_name": name}
        want = theirs(pipeline, latents=to_torch(noise()), height=16, width=16, num_inference_steps=6)
    finally:
        pipeline.scheduler = before
    model = dc.replace(loaded(kind), schedule=Schedule.from_config(config))
    start = jnp.asarray(noise())
    assert_close(ours(model, latents=start, steps=6), want, TOLERANCE)
