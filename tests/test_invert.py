"""From pictures to the latents that DDIM makes them of, and back; against the torch reference."""

from __future__ import annotations

import dataclasses as dc
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato import CFG, SfumatoError, generate, invert, run
from sfumato.samplers import DDIM, RegularisedInverse

from oracle import assert_close, from_torch, to_torch
from pictures import drawing
from pipelines import small
from runs import NEGATIVE, PROMPT, TOLERANCE, Pair, picture

SIZE = (64, 64)
"""Pixels; of the 32 x 32 latents, noise has three levels."""


def encoded(model, *images: Image.Image) -> np.ndarray:
    """Clean latents."""
    pixels = np.stack([np.asarray(image, np.float32) / 127.5 - 1 for image in images])
    return np.asarray(run.encode_image(model.vae, pixels, False))


# ---- The torch reference


def inverting(both: Pair) -> Pair:
    from diffusers import DDIMInverseScheduler

    parts = dict.fromkeys(("caption_generator", "caption_processor"))
    scheduler = DDIMInverseScheduler.from_config(both.pipeline.scheduler.config)
    return both.through("StableDiffusionPix2PixZeroPipeline", inverse_scheduler=scheduler, **parts)


def theirs(both: Pair, image: Image.Image, offsets: np.ndarray | None = None, **settings) -> np.ndarray:
    """The latents that their pipeline finds, where it draws `offsets`. It changes its network, but nothing it does."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

    drawn = iter([] if offsets is None else offsets.reshape(-1))

    def randint(*_, **__):
        return torch.tensor([int(next(drawn))])

    unet = both.pipeline.unet
    before = unet.attn_processors, [parameter.requires_grad for parameter in unet.parameters()]
    with (
        mock.patch.object(Posterior, "sample", lambda posterior, generator=None: posterior.mean),
        mock.patch.object(torch, "randint", randint),
    ):
        out = both.pipeline.invert(PROMPT, image, **settings).latents
    unet.set_attn_processor(before[0])
    for parameter, wanted in zip(unet.parameters(), before[1], strict=True):
        parameter.requires_grad_(wanted)
    assert next(drawn, None) is None, "the reference draws less often"
    return from_torch(out)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("kind", "scale"), [("sd1", 1.0), ("sd1", 3.0), ("sd2", 1.0)])
def test_as_the_reference(kind, scale, pair):
    both = inverting(pair(kind, small=True))
    want = theirs(both, picture(), num_inference_steps=5, guidance_scale=scale, num_reg_steps=0)
    got, captions = invert(both.model, picture(), PROMPT, steps=5, size=(16, 16), controls=[CFG(scale)] * (scale > 1))
    assert captions == [PROMPT]
    assert_close(got, want, TOLERANCE)


@pytest.mark.slow
@pytest.mark.parity
def test_regularised_as_the_reference(pair):
    """With its own numbers, and our offsets. Both keep the same trajectory through four rows of thirty gradients."""
    both, steps, image = inverting(pair("sd1", small=True)), 4, picture(size=SIZE)
    offsets = RegularisedInverse(shape=(32, 32, 4)).offsets(steps)
    want = theirs(both, image, offsets, num_inference_steps=steps)
    got, _ = invert(both.model, image, PROMPT, steps=steps, size=SIZE, regularise=True)
    assert_close(got, want, TOLERANCE)
    plain, _ = invert(both.model, image, PROMPT, steps=steps, size=SIZE)
    assert np.abs(got - plain).max() > 0.1, "nothing was regularised"


@pytest.mark.slow
@pytest.mark.parity
def test_sdxl_as_the_reference_by_hand(pair):
    """The reference has no inversion for SDXL, but a scheduler for it."""
    import torch
    from diffusers import DDIMInverseScheduler

    both = pair("sdxl", small=True)
    pipeline, scheduler = both.pipeline, DDIMInverseScheduler.from_config(both.pipeline.scheduler.config)
    scheduler.set_timesteps(5)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline.encode_prompt(PROMPT, do_classifier_free_guidance=False)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]])}
        x = to_torch(encoded(both.model, picture()))
        for t in scheduler.timesteps:
            out = pipeline.unet(x, t, encoder_hidden_states=hidden, added_cond_kwargs=added).sample
            x = scheduler.step(out, t, x).prev_sample
    got, _ = invert(both.model, picture(), PROMPT, steps=5, size=(16, 16))
    assert_close(got, from_torch(x), TOLERANCE)


# ---- There and back


def calm(model, share: float):
    """A model whose noise depends little on what it sees, as a trained one's does from step to step."""
    unet = jax.tree.map(lambda a: a, model.unet)
    unet.conv_out.kernel[...] = unet.conv_out.kernel[...] * share
    return dc.replace(model, unet=unet)


def there_and_back(model, steps: int, **settings) -> float:
    """The largest error, in shares of the range of the picture's latents."""
    image = drawing(48, 32)
    latents, captions = invert(model, image, PROMPT, steps=steps, size=(48, 32), **settings)
    back = generate(
        model, captions, latents=latents, steps=steps, size=(48, 32), sampler=DDIM(), controls=(), output="latents"
    )
    clean = encoded(model, image)
    return float(np.abs(np.asarray(back) - clean).max() / np.ptp(clean))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_constant_noise_is_inverted_exactly(kind, loaded):
    assert there_and_back(calm(small(kind, loaded(kind)), 0.0), 7) < 1e-5


@pytest.mark.slow
def test_more_steps_invert_better(loaded):
    """The error falls with the length of a step."""
    model = calm(small("sd1", loaded("sd1")), 0.02)
    errors = [there_and_back(model, steps) for steps in (8, 32, 128)]
    assert errors[0] > 1e-3, "too easy to show anything"
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 2
    assert errors[2] < 0.02


@pytest.mark.slow
def test_several_pictures(loaded):
    """Each with its own prompt, in rounds, watched: the same as one by one."""
    model, images, prompts = small("sd1", loaded("sd1")), [picture(seed) for seed in range(3)], ["a", "b c", "a fox"]
    settings = {"steps": 3, "size": (16, 16), "controls": [CFG(2.0)], "regularise": True}
    together, captions = invert(model, images, prompts, negative=NEGATIVE, **settings)
    assert captions == prompts
    assert together.shape == (3, 8, 8, 4)
    assert together.dtype == jnp.float32
    alone = [invert(model, i, p, negative=NEGATIVE, **settings)[0] for i, p in zip(images, prompts, strict=True)]
    assert_close(np.concatenate(alone), together, 1e-5)
    seen = []
    rounds, _ = invert(
        model, images, prompts, negative=[NEGATIVE] * 3, batch=2, devices=jax.devices()[:1], tiled=False,
        progress=lambda row, rows, preview: seen.append((row, rows)), **settings,
    )  # fmt: skip
    assert_close(rounds, together, 1e-5)
    assert seen == [(row + 1, 3) for row in range(3)] * 2
    same, captions = invert(model, images, "a", **settings)
    assert captions == ["a"] * 3
    assert_close(same[:1], invert(model, images[0], "a", **settings)[0], 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "sd1"}, "invert takes a model as sfumato.load returns it, not a str."),
        ({"image": "none.png"}, "none.png is not there."),
        ({"image": []}, "image: 0 pictures were given for 1 to be made; give one, or 1."),
        ({"image": [picture()] * 3, "prompt": ["a", "b"]}, "image: 3 pictures were given for 2 to be made"),
        ({"prompt": 3}, "prompt must be a text or a list of texts, not 3."),
        ({"steps": 0}, "steps must be a whole number from 1 on, not 0."),
        ({"steps": 1001}, "The model was trained with 1000 timesteps, too few for 1001 steps."),
        ({"regularise": 5}, "regularise is True, False or a RegularisedInverse, not 5."),
        ({"regularise": RegularisedInverse(rolls=-1)}, "Regularisation takes 5 iterations of -1 rolls; 0 is none."),
        ({"controls": "cfg"}, "controls takes a list of controls"),
        ({"batch": 0}, "batch must be a whole number from 1 on, not 0."),
        ({"size": (15, 16)}, "The picture"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_one_sentence(changes, message, loaded):
    call = {"model": loaded("sd1"), "image": picture(), "prompt": "a fox", "size": (16, 16)} | changes
    with pytest.raises(SfumatoError) as raised:
        sfumato.invert(call.pop("model"), call.pop("image"), call.pop("prompt"), **call)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_channels_that_nothing_fills(loaded):
    with pytest.raises(SfumatoError, match=r"5 input channels beside the latents, which no control fills; add Inpaint"):
        invert(loaded("sd1-inpaint"), picture(), "a fox", size=(16, 16))
