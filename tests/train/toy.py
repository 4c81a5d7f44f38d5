"""A world small enough to be learned in seconds: four pictures with their captions, and a model that draws them."""

from __future__ import annotations

import dataclasses as dc
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from PIL import Image, ImageDraw

import sfumato
from sfumato.io.family import Family
from sfumato.model import Model
from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL, VAEConfig
from sfumato.schedule import Schedule
from sfumato.text.tokenizer import clip_tokenizer
from sfumato.train.data import Batches, examples
from sfumato.train.fit import fit
from sfumato.train.task import Task, filled

from oracle import fresh
from pipelines import KINDS, SMALL, TEXT, VAE

SIDE = 8
"""Of a picture, in pixels; its latents have 4 x 4 places."""
WORDS = 8
"""Tokens in a prompt. Reading 77 would take most of the time."""
RED, BLUE, GOLD, PAPER, NIGHT = (230, 30, 30), (30, 60, 240), (250, 220, 20), (240, 240, 230), (40, 20, 60)


def disc(pen: Any, colour: Any) -> None:
    pen.ellipse([3, 3, 12, 12], fill=colour)


def box(pen: Any, colour: Any) -> None:
    pen.rectangle([1, 6, 9, 14], fill=colour)


def cross(pen: Any, colour: Any) -> None:
    pen.line([2, 2, 13, 13], fill=colour, width=3)
    pen.line([13, 2, 2, 13], fill=colour, width=3)


def picture(shape: Any, colour: Any, ground: Any = PAPER) -> Image.Image:
    drawn = Image.new("RGB", (16, 16), ground)
    shape(ImageDraw.Draw(drawn), colour)
    return drawn.resize((SIDE, SIDE), Image.Resampling.BOX)


KNOWN = {
    "a red disc": picture(disc, RED), "a red box": picture(box, RED),
    "a blue disc": picture(disc, BLUE), "a blue box": picture(box, BLUE),
}  # fmt: skip
"""What the base model learns."""
NEW = {"a gold cross": picture(cross, GOLD, NIGHT)}
"""What is learned later: none of its words, colours and forms has been seen before."""


@functools.cache
def blank() -> Model:
    """A model that knows nothing, as training from scratch starts: its autoencoder is random, but so that latents are
    the pictures' own, of mean 0 and variance 1."""
    vae = fresh(AutoencoderKL, from_dict(VAEConfig, VAE))
    last = vae.quant_conv
    last.kernel.set_value(last.kernel[...].at[..., 4:].set(0))
    last.bias.set_value(last.bias[...].at[4:].set(-20))
    means = jax.jit(lambda vae, x: vae.posterior(x).mean)(vae, pixels(KNOWN))
    center, spread = (tuple(map(float, found((0, 1, 2)))) for found in (means.mean, means.std))
    vae.config = dc.replace(vae.config, latents_mean=center, latents_std=spread, scaling_factor=1.0)
    unet = KINDS["sd1"][1] | SMALL | {"norm_num_groups": 4}
    text = TEXT | {"num_hidden_layers": 1, "max_position_embeddings": WORDS}
    return Model(
        started(UNet, from_dict(UNetConfig, unet)), vae,
        {"text_encoder": started(ClipTextEncoder, from_dict(ClipTextConfig, text))},
        {"tokenizer": dc.replace(clip_tokenizer(), max_length=WORDS)},
        Schedule(prediction_type="sample", rescale_betas_zero_snr=True, timestep_spacing="trailing"), Family.SD1,
    )  # fmt: skip


def started(network: Any, config: Any) -> Any:
    """A network of random numbers out of numpy, whose norms do nothing: jax's initializers take long to compile."""
    rng = np.random.default_rng(0)

    def value(path: Any, shape: tuple[int, ...]) -> jax.Array:
        if len(shape) == 1:
            return jnp.full(shape, float(path[-1] == "scale"))
        inputs = 1 if path[-1] == "embedding" else np.prod(shape[:-1])
        return jnp.asarray(rng.standard_normal(shape) / np.sqrt(inputs), jnp.float32)

    return filled(abstract(network, config), value)


def written(folder: Path, pictures: Mapping[str, Image.Image]) -> Path:
    """A folder of picture files with their captions."""
    folder.mkdir(parents=True)
    lines = []
    for number, (text, drawn) in enumerate(pictures.items()):
        drawn.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def batches(folder: Path, rows: int = 16, **settings: Any) -> Batches:
    """Batches of the pictures in a folder."""
    return Batches(examples(folder), **{"batch": rows, "size": (SIDE, SIDE), "threads": 1, **settings})


def trained(task: Task, data: Any, steps: int, rate: float, **settings: Any) -> Any:
    """What `fit` makes of what a task trains, by Adam with a rate that falls to 0."""
    settings = {"frozen": task.frozen, "collate": task.collate, "quiet": True} | settings
    rates = optax.cosine_decay_schedule(rate, steps)
    return fit(task.loss, task.trainable, data, optax.adam(rates), steps=steps, **settings).trainable


def pixels(pictures: Mapping[str, Any]) -> jax.Array:
    return jnp.asarray(np.stack([np.asarray(each, np.float32) for each in pictures.values()]) / 127.5 - 1)


def latents(model: Model, pictures: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What pictures are to the UNet."""
    found = jax.jit(lambda vae, x: vae.encode(x))(model.vae, pixels(pictures))
    return dict(zip(pictures, np.asarray(found), strict=True))


def distance(model: Model, prompt: str, wanted: np.ndarray, seed: int = 100) -> float:
    """The mean square between the latents of a picture and those that a model draws for a prompt, over four seeds."""
    drawn = sfumato.generate(
        model, prompt, count=4, seed=seed, steps=8, size=(SIDE, SIDE), controls=(), sampler="ddim", output="latents"
    )
    return float(np.square(np.asarray(drawn) - wanted).mean())
