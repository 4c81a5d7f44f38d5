"""The autoencoder between pictures and latents (arXiv:2112.10752, section 3.1), trained on pictures alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from PIL import Image

from sfumato.adapters.live import replaced
from sfumato.image import read, resize, to_array
from sfumato.images import Images, Picture
from sfumato.io.load import default_dtype
from sfumato.io.save import save
from sfumato.model import Model
from sfumato.models.vae import AutoencoderKL
from sfumato.plan import size_of
from sfumato.run import decode, encode_image, tiling
from sfumato.train.denoising import with_networks
from sfumato.train.discriminator import Adversarial, PatchDiscriminator
from sfumato.train.reconstruction import Reconstruction
from sfumato.train.samples import Sampling
from sfumato.train.task import Batch, Metrics, Task, cast, checkpointed, fresh, masters

DECODER = ("post_quant_conv", "decoder")
"""The parts of an autoencoder that turn latents into pictures."""


def autoencoder(
    model: Model, reconstruction: Reconstruction | None = None, adversarial: Adversarial | None = None, *,
    scratch: bool = False, decoder: bool = False, seed: int = 0, dtype: str | None = None, remat: bool = False,
) -> Task:  # fmt: skip
    """Trains the autoencoder of `model`, or with `scratch` a new one of the same configuration out of `seed`; with
    `decoder` its decoder alone, so that latents stay what they are.

    `adversarial` trains a discriminator beside it, as "discriminator" of the trainable weights; without it, or with a
    weight of 0, there is none. The loss is then the sum of both sides, so that checkpoints are to be compared by the
    metric "reconstruction". `dtype` is what is computed in, `remat` gradient checkpointing. Exports the whole model,
    without the discriminator. Unless the decoder alone was trained, a UNet that was trained before does not know the
    new latents; for one that is to be trained on them, see `sfumato.train.standardise.standardised`.
    """
    reconstruction, compute = reconstruction or Reconstruction(), dtype or default_dtype()
    start: nnx.Module = fresh(model.vae, seed) if scratch else model.vae
    parts = {name: getattr(start, name) for name in DECODER if hasattr(start, name)} if decoder else {"vae": start}
    trainable: dict[str, Any] = {name: checkpointed(masters(part), remat) for name, part in parts.items()}
    judged = adversarial if adversarial is not None and adversarial.weight > 0 else None
    if judged is not None:
        trainable["discriminator"] = masters(PatchDiscriminator(judged.discriminator, rngs=nnx.Rngs(seed)))

    def loss(
        trained: Any, frozen: Any, batch: Batch, key: jax.Array, step: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, ""], Metrics]:
        nets, pixels = cast(trained, compute), jnp.asarray(batch["pixels"])
        vae = whole(nets, frozen)
        posterior = vae.posterior(pixels)
        rebuilt = vae.decode(vae.scale(posterior.sample(jax.random.normal(key, posterior.mean.shape))))
        value, metrics = reconstruction(rebuilt, pixels, posterior)
        if judged is None:
            return value, metrics
        more, sides = judged(nets["discriminator"], rebuilt, pixels, step)
        return value + more, metrics | {"reconstruction": value} | sides

    def export(trained: Any, folder: Path) -> None:
        save(with_networks(model, {"vae": whole(trained, {"vae": start})}), folder)

    def draw(trained: Any, wishes: Sampling) -> Images:
        wishes.check(prompts=False, pictures=True)
        vae = checkpointed(cast(whole(trained, {"vae": start}), compute), False)
        size = size_of(model, wishes.size)
        return Images([through(vae, resize(read(name), size)) for name in wishes.pictures])

    frozen = {"vae": cast(start, compute)} if decoder else {}
    return Task(
        trainable, frozen, loss, lambda batch: {"pixels": np.asarray(batch["pixels"], np.float32)}, export, draw
    )


def whole(nets: Mapping[str, Any], frozen: Mapping[str, Any]) -> AutoencoderKL:
    """The autoencoder that is trained, or the one that stays with the parts that are trained."""
    return nets.get("vae") or replaced(frozen["vae"], {name: nets[name] for name in DECODER if name in nets})


def through(vae: AutoencoderKL, picture: Image.Image) -> Picture:
    """What is left of a picture that goes through the autoencoder, by the mean of its latents."""
    height, width = picture.height // vae.factor, picture.width // vae.factor
    tiled = tiling((height, width, vae.config.latent_channels), None)
    return Picture(np.asarray(decode(vae, encode_image(vae, to_array(picture)[None], tiled), tiled)[0]))
