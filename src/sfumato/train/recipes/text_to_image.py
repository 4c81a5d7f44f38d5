"""Text-to-image: the UNet, and the text encoders if wished, fine-tuned or from scratch (arXiv:2112.10752)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.io.save import save
from sfumato.model import Model
from sfumato.train.denoising import Denoising, check_channels, collate, networks, with_networks
from sfumato.train.objective import Objective
from sfumato.train.samples import Sampling, drawn
from sfumato.train.task import Task, checkpointed, fresh, masters, to_draw_with


def text_to_image(
    model: Model, objective: Objective | None = None, *, train: Collection[str] = ("unet",),
    scratch: Collection[str] = (), seed: int = 0, dtype: str | None = None, remat: bool = False, cached: bool = False,
) -> Task:  # fmt: skip
    """Trains the components `train` of `model` ("unet", "text_encoder", "text_encoder_2"), by default the UNet.

    Those in `scratch` start from random numbers out of `seed`: of these networks only the configuration is looked at.
    `dtype` is what is computed in, `remat` gradient checkpointing. With `cached` the batches hold what the autoencoder
    and, unless they are trained, the text encoders say (see `sfumato.train.denoising.cache`), and these are not kept in
    memory. Exports the whole model. Raises SfumatoError for components that cannot be trained, and models that take
    more than latents.
    """
    check_channels(model, "text-to-image")
    known = {"unet": model.unet, **model.text_encoders}
    strange = [*({*train} - known.keys()), *({*scratch} - {*train})]
    if strange or not train:
        raise SfumatoError(f"What is trained here is {', '.join(known)}, not {', '.join(strange) or 'nothing'}.")
    denoising = Denoising.of(model, objective, dtype=dtype)
    starts = {name: fresh(net, seed) if name in scratch else net for name, net in known.items() if name in train}

    scheduled = dc.replace(model, schedule=denoising.objective.schedule)

    def export(trained: Any, folder: Path) -> None:
        save(with_networks(scheduled, trained), folder)

    def draw(trained: Any, wishes: Sampling) -> Images:
        return drawn(with_networks(scheduled, to_draw_with(trained, model.dtype)), wishes)

    return Task(
        {name: checkpointed(masters(net), remat) for name, net in starts.items()},
        networks(model, without=train, dtype=dtype, remat=remat, cached=cached, reads={*train} != {"unet"}),
        denoising.loss,
        lambda batch: collate(model, batch),
        export,
        draw,
    )
