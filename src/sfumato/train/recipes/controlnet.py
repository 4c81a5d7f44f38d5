"""ControlNet (arXiv:2302.05543): the UNet stays as it is, a copy of its encoder half learns to steer it."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sfumato.controls import CFG
from sfumato.controls.controlnet import ControlNet as Control
from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.io.save import save
from sfumato.model import Model, check_fits
from sfumato.models.config import ControlNetConfig, EncoderConfig
from sfumato.models.controlnet import ControlEmbedding, ControlNet
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.train.consistency import Consistency
from sfumato.train.denoising import Denoising, Nets, check_channels, collate, networks
from sfumato.train.objective import Draws, Objective
from sfumato.train.samples import Sampling, drawn
from sfumato.train.task import Batch, Task, check_float, checkpointed, filled, masters, to_draw_with, values_of
from sfumato.types import Conditioning


def controlnet(
    model: Model, net: ControlNet | None = None, objective: Objective | None = None,
    consistency: Consistency | None = None, *, hint: int = 16, seed: int = 0,
    dtype: str | None = None, remat: bool = False, cached: bool = False,
) -> Task:  # fmt: skip
    """Trains a ControlNet for `model`: `net`, or a new one that starts from the UNet (`from_unet`) out of `seed`, with
    `hint` channels where it begins to read the control picture. With `consistency` pictures are compared beside
    latents, which makes what is drawn follow the control more closely.

    The data needs "conditioning" pictures in [0, 1]. `dtype` is what is computed in, `remat` gradient checkpointing;
    `cached` as of `text_to_image`. Exports the ControlNet alone. Raises MismatchError for a `net` that does not fit
    the model, and SfumatoError for models that take more than latents, or whose latents `net` cannot match in size, and
    for int8 kernels.
    """
    check_channels(model, "controlnet")
    net = from_unet(model.unet, model.vae.factor, seed, hint) if net is None else net
    check_float(net)
    check_fits(net, model)
    shrinks = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
    if shrinks != model.vae.factor:
        raise SfumatoError(
            f"This ControlNet makes control pictures {shrinks} times smaller, and the latents of "
            f"{model.name or 'the model'} are {model.vae.factor} times smaller than pictures."
        )

    def export(trained: Any, folder: Path) -> None:
        save(trained["controlnet"], folder)

    def draw(trained: Any, wishes: Sampling) -> Images:
        wishes.check(pictures=True)
        control = Control(to_draw_with(trained, model.dtype)["controlnet"], list(wishes.pictures))
        return drawn(model, wishes, [CFG(wishes.guidance), control])

    return Task(
        {"controlnet": checkpointed(masters(net), remat)},
        networks(model, dtype=dtype, remat=remat, cached=cached, decodes=consistency is not None),
        Denoising.of(model, objective, dtype=dtype, extend=steered, consistency=consistency).loss,
        lambda batch: collate(model, batch, "conditioning"),
        export,
        draw,
    )


def steered(
    nets: Nets, batch: Batch, draws: Draws, noisy: Float[Array, "B h w C"], cond: Conditioning
) -> Conditioning:  # fmt: skip
    """The conditioning with what the ControlNet adds."""
    residuals = nets["controlnet"](noisy, draws.t.astype(jnp.float32), cond, batch["conditioning"])
    return dc.replace(cond, residuals=residuals)


def from_unet(unet: UNet, factor: int = 8, seed: int = 0, hint: int = 16, **settings: Any) -> ControlNet:
    """A ControlNet that starts as a copy of the UNet's encoder half, float32, and adds exactly nothing (section 3.2).

    `factor` is how many pixels a latent stands for; `hint` how many channels the first of the layers has that read
    the control picture, from which those of the others follow as in the paper, where it is 16; `settings` are further
    ones of `ControlNetConfig`. Those layers are random, and the zero convolutions zero. Raises SfumatoError for a
    `hint` under 1.
    """
    if hint < 1:
        raise SfumatoError(f"A ControlNet reads its control picture with at least 1 channel, not {hint}.")
    shared = {field.name: getattr(unet.config, field.name) for field in dc.fields(EncoderConfig)}
    # It sees the latents alone, also where the UNet has further channels (mask, depth).
    shared["in_channels"] = unet.config.out_channels
    widths = tuple(hint * times for times in (*(1, 2, 6, 16, 16, 16)[: factor.bit_length() - 1], 16))
    config = ControlNetConfig(**shared, **{"conditioning_embedding_out_channels": widths, **settings})
    copied, new = values_of(unet), values_of(ControlEmbedding(config, rngs=nnx.Rngs(seed)))

    def start(path: tuple[Any, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[0] == "controlnet_cond_embedding":
            return new[path[1:]]
        if path == ("conv_in", "kernel"):
            return copied[path][:, :, : config.in_channels]
        return copied[path] if path in copied else np.zeros(shape, np.float32)

    return filled(abstract(ControlNet, config), start)
