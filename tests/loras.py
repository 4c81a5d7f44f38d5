"""LoRA files in every format, written from the same random matrices, and the reference that reads them."""

from __future__ import annotations

import copy
import dataclasses as dc
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_names import layers_of_model
from sfumato.io.original_names import inverse, rename, unet_names
from sfumato.model import Model

Tensors = dict[str, np.ndarray]

ATTENTION = r"\.(attn[12]\.to_|self_attn\.)"
"""Layers that every format has."""
EVERYWHERE = ATTENTION + r"|proj_|\.ff\.|\.mlp\.|conv|time_emb|add_embedding|upsamplers|downsamplers"
"""And all others that have kernels, but for the projection of text."""
RNG = np.random.default_rng(7)

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY, CONV, NORM = f"{BLOCK}.attn1.to_q", "down_blocks.0.resnets.0.conv1", f"{BLOCK}.norm1"
"""A dense layer, a convolution of 3 x 3 and a norm."""
FLAT = {path: "lora_unet_" + path.replace(".", "_") for path in (QUERY, CONV, NORM)}
"""Their names in kohya's format."""
WIDTH = 32
"""Their inputs and outputs in the tiny model of SD 1.x."""

TEXT_OLD = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


def some(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def one(value: Any = None, path: str = QUERY, **parts: Any) -> dict[str, np.ndarray]:
    """The tensors of one layer of kohya's with rank 4."""
    shape = (WIDTH, WIDTH, 3, 3) if path == CONV else (WIDTH, WIDTH)
    found = {"lora_down.weight": some(4, *shape[1:]), "lora_up.weight": some(shape[0], 4, *[1] * (len(shape) - 2))}
    found |= {"alpha": np.asarray(value)} if value is not None else {}
    return {f"{FLAT[path]}.{part}": array for part, array in (found | parts).items() if array is not None}


def names(lora: Lora) -> set[str]:
    """All layers that a LoRA changes."""
    return {f"{component}.{path}" for component, deltas in lora.layers.items() for path in deltas}


@dc.dataclass(frozen=True)
class Layer:
    """A low-rank change of a layer in torch's layout."""

    component: str
    path: str
    down: np.ndarray
    up: np.ndarray
    alpha: float | None = None
    magnitude: np.ndarray | None = None

    @property
    def change(self) -> np.ndarray:
        """(alpha / rank) up down, without DoRA."""
        rank = len(self.down)
        matrix = self.up.reshape(-1, rank) @ self.down.reshape(rank, -1)
        scale = 1.0 if self.alpha is None else self.alpha / rank
        return (scale * matrix).reshape(len(self.up), *self.down.shape[1:])


def draw(
    model: Any, target: str = ATTENTION, *, ranks: Sequence[int] = (4,), alpha: float | None = None, dora: bool = False,
    seed: int = 0,
) -> list[Layer]:  # fmt: skip
    """Random changes of the layers of a model that match a pattern; `ranks` take turns."""
    rng = np.random.default_rng(seed)
    found = []
    for component, layers in layers_of_model(model).items():
        for path, shape in layers.shapes.items():
            if len(shape) < 2 or not re.search(target, path):
                continue
            rank, (*sides, inputs, outputs) = ranks[len(found) % len(ranks)], shape
            down = rng.standard_normal((rank, inputs, *sides)).astype(np.float32)
            up = 0.1 * rng.standard_normal((outputs, rank, *[1] * len(sides))).astype(np.float32)
            magnitude = rng.uniform(0.5, 1.5, outputs).astype(np.float32) if dora else None
            found.append(Layer(component, path, down, up, alpha, magnitude))
    return found


def kohya(layers: Sequence[Layer], original: Mapping[str, str] | None = None) -> Tensors:
    """`original` are the names of the UNet's layers in the original layout, by ours."""
    xl = any(layer.component == "text_encoder_2" for layer in layers)
    prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1" if xl else "lora_te", "text_encoder_2": "lora_te2"}
    tensors: Tensors = {}
    for layer in layers:
        path = rename(layer.path, original or {}) if layer.component == "unet" else None
        stem = f"{prefixes[layer.component]}_{(path or layer.path).replace('.', '_')}"
        tensors |= {f"{stem}.lora_down.weight": layer.down, f"{stem}.lora_up.weight": layer.up}
        if layer.alpha is not None:
            tensors[f"{stem}.alpha"] = np.asarray(layer.alpha, np.float32)
        if layer.magnitude is not None:
            tensors[f"{stem}.dora_scale"] = layer.magnitude.reshape(-1, *[1] * (layer.down.ndim - 1))
    return tensors


def original(model: Model) -> dict[str, str]:
    """The names of a UNet's layers in the original layout, by ours."""
    config = model.unet.config
    return inverse(unet_names(config.down_block_types, config.up_block_types, config.layers_per_block))


def diffusers_old(layers: Sequence[Layer], prefix: bool = True) -> Tensors:
    """Attention alone; the first files had only a UNet and no prefix."""
    tensors: Tensors = {}
    for layer in layers:
        *above, last = layer.path.removesuffix(".0").split(".")
        inner = ["processor", last] if layer.component == "unet" else [TEXT_OLD[last]]
        stem = ".".join([*([layer.component] if prefix else []), *above, *inner]) + "_lora"
        tensors |= {f"{stem}.down.weight": layer.down, f"{stem}.up.weight": layer.up}
    return tensors


def diffusers_new(layers: Sequence[Layer]) -> Tensors:
    tensors: Tensors = {}
    for layer in layers:
        kind = "lora" if layer.component == "unet" else "lora_linear_layer"
        stem = f"{layer.component}.{layer.path}.{kind}"
        tensors |= {f"{stem}.down.weight": layer.down, f"{stem}.up.weight": layer.up}
    return tensors


def peft(layers: Sequence[Layer], prefix: str | None = None, adapter: str = "") -> Tensors:
    """Under the component's name, or another prefix."""
    tensors: Tensors = {}
    for layer in layers:
        stem = f"{layer.component}." if prefix is None else prefix
        stem += f"{layer.path}."
        tensors |= {f"{stem}lora_A{adapter}.weight": layer.down, f"{stem}lora_B{adapter}.weight": layer.up}
        if layer.magnitude is not None:
            wide = layer.magnitude if layer.down.ndim == 2 else layer.magnitude.reshape(1, -1, 1, 1)
            weight = "" if layer.component == "unet" else ".weight"
            tensors[f"{stem}lora_magnitude_vector{weight}"] = wide
    return tensors


FORMATS: dict[str, Callable[[Sequence[Layer]], Tensors]] = {
    "kohya": kohya,
    "diffusers (old)": diffusers_old,
    "diffusers": diffusers_new,
    "diffusers (PEFT names)": peft,
    "PEFT": lambda layers: peft(layers, "base_model.model."),
}


def write(file: Path, tensors: Mapping[str, np.ndarray], **metadata: Any) -> Path:
    """A .safetensors file; metadata that is no string becomes JSON."""
    words = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, words or None)
    return file


def fused(pipeline: Any, file: Path) -> dict[str, np.ndarray]:
    """The weights of a pipeline of the reference with a LoRA in them, by "component.path"; itself it stays."""
    parts = {name: copy.deepcopy(part) if hasattr(part, "parameters") else part
             for name, part in pipeline.components.items()}  # fmt: skip
    other = type(pipeline)(**parts)
    other.load_lora_weights(str(file.parent), weight_name=file.name)
    other.fuse_lora(components=[name for name in ("unet", "text_encoder", "text_encoder_2") if name in parts])
    return weights(other)


def weights(pipeline: Any) -> dict[str, np.ndarray]:
    """The weights of all layers of a pipeline of the reference, by "component.path"."""
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, component, None)
        for key, value in ({} if module is None else module.state_dict()).items():
            path = key.replace(".base_layer", "").removesuffix(".weight")
            if component != "unet" and not path.startswith("text_"):
                path = f"text_model.{path}"  # newer versions of transformers leave the outermost name out
            if key.endswith(".weight") and "lora_" not in key:
                found[f"{component}.{path}"] = value.detach().numpy()
    return found
