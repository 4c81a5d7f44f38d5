"""A run with a torch pipeline and the same with sfumato: what both are given, and whether they make the same."""

from __future__ import annotations

import dataclasses as dc
import sys
from collections.abc import Iterable
from typing import Any
from unittest import mock

import jax.numpy as jnp
import numpy as np
from PIL import Image

import sfumato
from sfumato import run
from sfumato.model import Model
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.unet import UNet
from sfumato.schedule import Schedule

from oracle import assert_close, fill_from_torch, from_torch, seeded, to_torch
from pipelines import KINDS, SMALL
from samplers.oracle import drawing

PROMPT, NEGATIVE = "a red fox in the snow", "blurry"
SIZE = (16, 16)
"""Pixels, the tiny models' own size; the tiny autoencoder halves them."""
TOLERANCE = 2e-3
STEPS = 4


def noise(shape: tuple[int, ...] = (1, 8, 8, 4), seed: int = 5) -> np.ndarray:
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


@dc.dataclass(frozen=True)
class Pair:
    """A torch pipeline, and the same model of ours. Both start from `noise()` unless they are told otherwise."""

    pipeline: Any
    model: Model

    def through(self, name: str, **parts: Any) -> Pair:
        """The same model in another of diffusers' pipelines, which may need further parts."""
        import diffusers

        pipeline = getattr(diffusers, name).from_pipe(self.pipeline, **parts)
        pipeline.set_progress_bar_config(disable=True)
        return dc.replace(self, pipeline=pipeline)

    def scheduled(self, scheduler: Any) -> Pair:
        """With another scheduler, and for ours what its configuration says."""
        schedule = Schedule.from_config({**scheduler.config, "_class_name": type(scheduler).__name__})
        changed = self.through(type(self.pipeline).__name__, scheduler=scheduler)
        return dc.replace(changed, model=dc.replace(self.model, schedule=schedule))

    def smaller(self, kind: str) -> Pair:
        """With another UNet, which compiles quickly."""
        from diffusers import UNet2DConditionModel

        config = KINDS[kind][1] | SMALL
        net = seeded(lambda: UNet2DConditionModel(**config), 1)
        unet = fill_from_torch(UNet, from_dict(UNetConfig, config), net)
        changed = self.through(type(self.pipeline).__name__, unet=net)
        return dc.replace(changed, model=dc.replace(self.model, unet=unet))

    def theirs(self, prompt: Any = PROMPT, steps: int = STEPS, rows: Iterable[np.ndarray] = (), **kwargs: Any):
        """The pipeline's final latents [B h w C]; its scheduler draws `rows` one after another.

        The reference draws from the posterior of the autoencoder, where we take the mean; so does it here.
        """
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution as Posterior

        settings = {"guidance_scale": 5.0, "negative_prompt": NEGATIVE} | kwargs
        module = sys.modules[type(self.pipeline).__module__]
        drawn = (to_torch(row).numpy() for row in rows)
        with (
            mock.patch.object(Posterior, "sample", lambda posterior, generator=None: posterior.mean),
            mock.patch.object(module, "randn_tensor", return_value=to_torch(noise())),
            drawing(self.pipeline.scheduler, drawn),
        ):
            out = self.pipeline(prompt, num_inference_steps=steps, output_type="latent", **settings).images
        return from_torch(out)

    def ours(self, prompt: Any = PROMPT, **kwargs: Any) -> np.ndarray:
        """Our final latents."""
        settings = {
            "steps": STEPS, "controls": [sfumato.CFG(5.0)], "negative": NEGATIVE, "size": SIZE, "latents": noise(),
        } | kwargs  # fmt: skip
        return np.asarray(sfumato.generate(self.model, prompt, output="latents", **settings))

    def assert_same(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """The latents are the same, and so are the pictures that each makes of its own."""
        import torch

        assert_close(ours, theirs, TOLERANCE)
        vae = self.pipeline.vae
        with torch.no_grad():
            pixels = from_torch(vae.decode(to_torch(theirs) / vae.config.scaling_factor).sample)
        want = np.round((pixels.clip(-1, 1) + 1) * 127.5)
        got = np.asarray(run.decode(self.model.vae, jnp.asarray(ours), False))
        assert want.std() > 10, "the picture shows nothing, so it would prove nothing"
        assert np.abs(got - want).max() <= 2
