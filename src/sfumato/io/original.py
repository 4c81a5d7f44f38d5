"""Networks of the original layout with the diffusers layout's keys and shapes.

Each function takes the tensors of one network by their keys without `prefix`, and gives them by diffusers keys.
Tensors that are there already pass; a key that belongs to nothing known is given under its whole original name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping

import numpy as np

from sfumato.io.lazy import LazyTensor
from sfumato.io.original_names import controlnet_names, open_clip_names, rename, unet_names, vae_names
from sfumato.models.vae import VAE_OLD_NAMES

Tensors = dict[str, LazyTensor]

SD2_WIDTH, SD2_LAYERS = 1024, 23
"""SD 2.x reads the last but one of the 24 layers of its OpenCLIP text encoder."""


def unet(section: Mapping[str, LazyTensor], prefix: str = "") -> Tensors:
    """A UNet."""
    if not _starts(section, "input_blocks."):
        return dict(section)
    down, up, layers = levels(section)
    return _renamed(section, unet_names(down, up, layers), prefix)


def controlnet(section: Mapping[str, LazyTensor], prefix: str = "") -> Tensors:
    """A ControlNet."""
    if not _starts(section, "input_blocks."):
        return dict(section)
    down, _, layers = levels(section)
    hint = sum(key.startswith("input_hint_block.") and key.endswith(".weight") for key in section) - 2
    return _renamed(section, controlnet_names(down, layers, hint), prefix)


def vae(section: Mapping[str, LazyTensor], prefix: str = "") -> Tensors:
    """An autoencoder, of which a half may be missing. The 1x1 convolutions of its attention become matrices, and the
    attention's names of early diffusers files those of today."""
    if _starts(section, "encoder.down.", "decoder.up."):
        half = "encoder.down" if _starts(section, "encoder.down.") else "decoder.up"
        layers = _count(section, half + ".0.block.{}.conv1.weight") - (half == "decoder.up")
        found = _renamed(section, vae_names(_count(section, half + ".{}.block.0.conv1.weight"), layers), prefix)
    else:
        found = {own_vae_name(key): tensor for key, tensor in section.items()}
    return {
        key: _matrix(tensor) if ".attentions." in key and len(tensor.shape) > 2 else tensor
        for key, tensor in found.items()
    }


def clip(section: Mapping[str, LazyTensor], prefix: str = "") -> Tensors:
    """A CLIP text encoder in the layout of transformers."""
    names = {key: own_text_name(key) for key in section}
    known = ("text_model.", "text_projection.")
    return {new if new.startswith(known) else prefix + key: section[key] for key, new in names.items()}


def open_clip(section: Mapping[str, LazyTensor], prefix: str = "") -> Tensors:
    """An OpenCLIP text encoder; that of SD 2.x without the layer and the projection that nobody reads."""
    stem = "transformer.resblocks."
    layers = _count(section, stem + "{}.ln_1.weight")
    if "ln_final.weight" in section and section["ln_final.weight"].shape == (SD2_WIDTH,):
        unread = (f"{stem}{SD2_LAYERS}.", "text_projection")
        section = {key: tensor for key, tensor in section.items() if not key.startswith(unread)}
        layers = min(layers, SD2_LAYERS)
    names = open_clip_names(layers) | {"text_projection.weight": "text_projection.weight"}
    found: Tensors = {}
    for key, tensor in _renamed(section, names, prefix).items():
        if "{}" in key:
            found |= {key.format(f"{part}_proj"): third for part, third in zip("qkv", _thirds(tensor), strict=True)}
        elif key == "text_projection.weight" and "text_projection" in section:
            found[key] = tensor.map(tensor.shape[::-1], np.transpose)
        else:
            found[key] = tensor
    return found


def levels(keys: Iterable[str]) -> tuple[list[str], list[str], list[int]]:
    """The down blocks, up blocks and layers of each level of an original UNet or ControlNet, in diffusers' terms.

    A downsampler ends a level; the way up mirrors the way down.
    """
    keys, attends, layers = set(keys), [False], [0]
    for i in itertools.count(1):
        if f"input_blocks.{i}.0.op.weight" in keys:
            attends.append(False)
            layers.append(0)
        elif f"input_blocks.{i}.0.in_layers.0.weight" in keys:
            attends[-1] |= f"input_blocks.{i}.1.norm.weight" in keys
            layers[-1] += 1
        else:
            break
    kinds = [("CrossAttn{}Block2D" if here else "{}Block2D") for here in attends]
    return [kind.format("Down") for kind in kinds], [kind.format("Up") for kind in reversed(kinds)], layers


def own_vae_name(key: str) -> str:
    """A key of an autoencoder of the diffusers layout, whose attention was renamed in 2023."""
    match = re.fullmatch(r"((?:en|de)coder\.mid_block\.attentions\.0)\.(\w+)(\.\w+)", key)
    return f"{match[1]}.{VAE_OLD_NAMES[match[2]]}{match[3]}" if match and match[2] in VAE_OLD_NAMES else key


def own_text_name(key: str) -> str:
    """A key of a text encoder of transformers, some versions of which leave out the outermost name."""
    return f"text_model.{key}" if key.startswith(("embeddings.", "encoder.", "final_layer_norm.")) else key


def _renamed(section: Mapping[str, LazyTensor], names: Mapping[str, str], prefix: str) -> Tensors:
    return {rename(key, names) or prefix + key: tensor for key, tensor in section.items()}


def _matrix(tensor: LazyTensor) -> LazyTensor:
    shape = tensor.shape[:2]
    return tensor.map(shape, lambda array: array.reshape(shape))


def _thirds(tensor: LazyTensor) -> list[LazyTensor]:
    size = tensor.shape[0] // 3
    return [
        tensor.map((size, *tensor.shape[1:]), lambda array, i=i: array[i * size : (i + 1) * size]) for i in range(3)
    ]


def _starts(keys: Iterable[str], *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in keys)


def _count(keys: Mapping[str, LazyTensor], key: str) -> int:
    return next(i for i in itertools.count() if key.format(i) not in keys)
