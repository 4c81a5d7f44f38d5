"""LoRA (arXiv:2106.09685): low-rank changes beside the frozen layers of the UNet and, if wished, the text encoders."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sfumato.adapters.delta import LowRank, stored
from sfumato.adapters.live import is_live
from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_names import layers_of_model
from sfumato.adapters.save_lora import save_lora
from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.model import Model
from sfumato.train.denoising import Denoising, Nets, check_channels, collate, networks, with_networks
from sfumato.train.objective import Objective
from sfumato.train.samples import Sampling, drawn
from sfumato.train.task import Batch, Metrics, Task

Factors = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""By component and checkpoint path of the layer, its "down" and "up" as `LowRank` has them. There is no scale in it,
which an optimizer that decays weights would change."""

TARGETS = {
    "attention": r"\.(attn[12]\.to_|self_attn\.)",
    "transformer": r"\.(attentions|self_attn|mlp)\.",
    "all": r"^(?!text_projection$)",
}
"""Layers by name: the projections of attention (what diffusers' scripts train), all layers of the transformers
(kohya's choice), and the convolutions and the embeddings of times as well."""

KOHYA_NAME = "lora.safetensors"


def lora(
    model: Model, objective: Objective | None = None, *, rank: int = 4, alpha: float | None = None,
    targets: str | Sequence[str] = "attention", text: bool = False, seed: int = 0, dtype: str | None = None,
    remat: bool = False, cached: bool = False,
) -> Task:  # fmt: skip
    """Trains low-rank changes, times alpha / rank, of layers of the UNet and with `text` of the text encoders.

    `targets` is a name of `TARGETS`, or regular expressions that are looked for in checkpoint paths such as
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q". An `alpha` of None is the rank. The rest is as in
    `text_to_image`. Exports lora.safetensors for kohya's scripts and the user interfaces, and
    pytorch_lora_weights.safetensors for diffusers. Raises SfumatoError for settings out of range, targets that are
    nowhere, and models that take more than latents or that a LoRA is live on.
    """
    check_channels(model, "LoRA")
    if any(map(is_live, (model.unet, *model.text_encoders.values()))):
        raise SfumatoError("A LoRA is live on this model; apply it without live=True to train another on top of it.")
    if rank < 1 or not math.isfinite(rank if alpha is None else alpha):
        raise SfumatoError(f"A LoRA has a rank from 1 on and an alpha that is finite, not {rank} and {alpha}.")
    denoise = Denoising.of(model, objective)

    def loss(factors: Factors, frozen: Nets, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        return denoise(adapted_nets(as_lora(factors, alpha), model, frozen), batch, key)

    def export(factors: Factors, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_lora(as_lora(factors, alpha), folder / KOHYA_NAME, "kohya", overwrite=True)
        save_lora(as_lora(factors, alpha), folder, "diffusers", overwrite=True)

    def draw(factors: Factors, wishes: Sampling) -> Images:
        # Merged, so that the programs are those of the model alone.
        return drawn(as_lora(factors, alpha).apply(model), wishes)

    return Task(
        fresh_factors(model, rank, targets, text=text, seed=seed),
        networks(model, dtype=dtype, remat=remat, cached=cached, reads=text),
        loss,
        lambda batch: collate(model, batch),
        export,
        draw,
    )


def as_lora(factors: Factors, alpha: float | None = None) -> Lora:
    """What was trained, as a Lora; `alpha` is that of the training, None for the rank."""
    return Lora({
        component: {
            path: LowRank(pair["down"], pair["up"], scale=1.0 if alpha is None else alpha / len(pair["down"]))
            for path, pair in layers.items()
        }
        for component, layers in factors.items()
    })  # fmt: skip


def adapted_nets(change: Lora, model: Model, nets: Nets) -> dict[str, Any]:
    """The networks of `model`, which are `nets`, with a LoRA beside their layers."""
    live = change.apply(with_networks(model, nets), live=True)
    changed = {"unet": live.unet, **live.text_encoders}
    return {**nets, **{name: changed[name] for name in change.layers}}


def fresh_factors(
    model: Model, rank: int, targets: str | Sequence[str] = "attention", *, text: bool = False, seed: int = 0
) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Factors that change nothing: every `up` is zero.

    `down` is uniform in +- 1 / sqrt(inputs), as in kohya's scripts and PEFT (Kaiming's rule with a slope of sqrt(5)).
    """
    chosen = [TARGETS.get(targets, targets)] if isinstance(targets, str) else list(targets)
    if not chosen:
        raise SfumatoError("A LoRA needs targets: a pattern for the layers that it changes.")
    try:
        pattern = re.compile("|".join(f"(?:{each})" for each in chosen))
    except re.error as error:
        raise SfumatoError(f"The targets {targets!r} are no regular expression: {error}.") from None
    rng, factors = np.random.default_rng(seed), {}
    for component, layers in layers_of_model(model).items():
        if component != "unet" and not text:
            continue
        shapes = {path: stored(shape) for path, shape in layers.shapes.items()}
        factors[component] = {
            path: _pair(rng, shape, rank) for path, shape in shapes.items() if len(shape) > 1 and pattern.search(path)
        }
        if not factors[component]:
            raise SfumatoError(f"None of the targets {', '.join(chosen)} is a layer of {component}.")
    return factors


def _pair(rng: np.random.Generator, shape: tuple[int, ...], rank: int) -> dict[str, np.ndarray]:
    """The factors of a layer whose weight on disk has this shape."""
    outputs, *inputs = shape
    bound = math.prod(inputs) ** -0.5
    return {
        "down": rng.uniform(-bound, bound, (rank, *inputs)).astype(np.float32),
        "up": np.zeros((outputs, rank, *[1] * (len(inputs) - 1)), np.float32),
    }
