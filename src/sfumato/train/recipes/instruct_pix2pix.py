"""InstructPix2Pix (arXiv:2211.09800): the UNet learns to edit a picture by what is said of it."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sfumato.controls.instruct_pix2pix import InstructPix2Pix as Edit
from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.io.save import save
from sfumato.model import Model
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.train.denoising import Denoising, Nets, before, collate, networks, scales_edits, with_networks
from sfumato.train.objective import Draws, Objective
from sfumato.train.samples import Sampling, drawn
from sfumato.train.task import Batch, Task, checkpointed, filled, to_draw_with, values_of
from sfumato.types import Conditioning

DROPOUT = 0.05
"""The share of rows without the instruction alone, without the picture alone, and without both (section 3.2.1)."""


def instruct_pix2pix(
    model: Model, objective: Objective | None = None, *, dtype: str | None = None, remat: bool = False,
    cached: bool = False,
) -> Task:  # fmt: skip
    """Trains the UNet of `model` to edit; one that takes only latents gets channels for the picture, which start at 0.

    The data needs instructions ("text"), edited pictures ("pixels") and the pictures before ("conditioning", in
    [0, 1]). The `objective` is by default plain, with the dropout of the paper. `dtype` is what is computed in,
    `remat` gradient checkpointing; with `cached` the batches are those of `sfumato.train.denoising.cache` with `edits`.
    Exports the whole model. Raises SfumatoError for models with other extra channels.
    """
    objective = objective or Objective(
        model.schedule, dropout=DROPOUT, image_dropout=DROPOUT, joint_dropout=DROPOUT
    )  # fmt: skip
    latents, channels = model.vae.config.latent_channels, model.unet.config.in_channels
    if channels not in (latents, 2 * latents):
        raise SfumatoError(
            f"InstructPix2Pix starts from models of {latents} or {2 * latents} input channels, and "
            f"{model.name or 'this one'} has {channels}."
        )
    scaled = scales_edits(model)

    def seen(
        nets: Nets, batch: Batch, draws: Draws, noisy: Float[Array, "B h w C"], cond: Conditioning
    ) -> Conditioning:
        """The conditioning with the latents of the picture before; zeros where it is dropped."""
        picture = batch["channels"] if cached else before(nets["vae"], batch["conditioning"], scaled)
        return dc.replace(cond, channels=jnp.where(draws.dropped_image[:, None, None, None], 0, picture))

    scheduled = dc.replace(model, schedule=objective.schedule)

    def export(trained: Any, folder: Path) -> None:
        save(with_networks(scheduled, trained), folder)

    def draw(trained: Any, wishes: Sampling) -> Images:
        wishes.check(pictures=True)
        edit = Edit(list(wishes.pictures), text_scale=wishes.guidance)
        return drawn(with_networks(scheduled, to_draw_with(trained, model.dtype)), wishes, [edit])

    return Task(
        {"unet": checkpointed(widened(model.unet, 2 * latents), remat)},
        networks(model, without=("unet",), dtype=dtype, remat=remat, cached=cached),
        Denoising.of(model, objective, dtype=dtype, extend=seen).loss,
        lambda batch: collate(model, batch, "channels" if cached else "conditioning"),
        export,
        draw,
    )


def widened(unet: UNet, channels: int) -> UNet:
    """A float32 copy of the UNet with `channels` input channels; the new ones have no effect, their weights are 0."""
    values = values_of(unet)
    more = channels - values["conv_in", "kernel"].shape[2]
    values["conv_in", "kernel"] = np.pad(values["conv_in", "kernel"], ((0, 0), (0, 0), (0, more), (0, 0)))
    config = dc.replace(unet.config, in_channels=channels)
    return filled(abstract(UNet, config), lambda path, shape: values[path])
