"""The names that programs give to the layers of a network, and the layer of ours that each means.

Names are compared with underscores for dots, as kohya writes them, so one table serves every format: our own paths
(those of diffusers), the numbering of the original layout, and the few abbreviations of older files.
"""

from __future__ import annotations

import dataclasses as dc
import difflib
import functools
import heapq
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.adapters.published import TEXT_ENCODERS, UNETS
from sfumato.io.family import Family
from sfumato.io.fill import slots
from sfumato.io.original_names import controlnet_names, inverse, rename, unet_names
from sfumato.model import Model
from sfumato.models.clip import ClipTextEncoder
from sfumato.models.config import UNetConfig
from sfumato.models.controlnet import ControlNet
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet

PREFIXES: tuple[tuple[re.Pattern[str], str | None], ...] = tuple((re.compile(pattern), name) for pattern, name in (
    (r"lora_unet_|(base_model\.model\.)?unet[.:]|lycoris_unet_", "unet"),
    (r"lora_te1?_|(base_model\.model\.)?text_encoder[.:]|lycoris_te1?_", "text_encoder"),
    (r"lora_te2_|(base_model\.model\.)?text_encoder_2[.:]|lycoris_te2_", "text_encoder_2"),
    (r"lora_controlnet_|(base_model\.model\.)?controlnet[.:]", "controlnet"),
    (r"(model\.)?diffusion_model\.", "unet"),
    (r"lycoris_|base_model\.model\.|", None),
))  # fmt: skip
"""What stands before a layer's name, and the component that it tells; None where it tells nothing."""

BEYOND = re.compile(r"(up_blocks|output_blocks|conv_norm_out|conv_out|out_[02])(_|$)")
"""Layers of a UNet that a ControlNet does not have, in either numbering."""

LONGEST = 200
"""Letters of names for which a similar one is looked up."""

OLD_TEXT = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
"""What early diffusers called the projections of text encoders."""

TARGETS = {
    "CrossAttention": r"\.attn[12]\.", "Attention": r"\.attn[12]\.", "GEGLU": r"\.ff\.net\.0\.proj$",
    "ResnetBlock2D": r"\.resnets\.\d+\.(conv|time_emb)", "CLIPAttention": r"\.self_attn\.", "CLIPMLP": r"\.mlp\.",
}  # fmt: skip
"""Which layers cloneofsimo's targets, classes of torch modules, have inside."""
DEFAULT_TARGETS = {"unet": ("CrossAttention", "GEGLU"), "text_encoder": ("CLIPAttention",)}
ORDERS = tuple(
    f"{blocks} attentions resnets {inner} to_q to_k to_v to_out conv1 time_emb_proj conv2 conv_shortcut "
    "self_attn mlp k_proj v_proj q_proj out_proj fc1 fc2".split()
    for blocks in ("down_blocks up_blocks mid_block", "down_blocks mid_block up_blocks")
    for inner in ("attn1 ff attn2", "attn1 attn2 ff")
)
"""In which order torch enumerates layers: as they were assigned, which differs between versions of diffusers. The
versions of cloneofsimo's time assigned the middle block last and the feed-forward before the second attention."""


@dc.dataclass(frozen=True, eq=False)
class Layers:
    """The layers of one network that an adapter can change."""

    shapes: Mapping[str, tuple[int, ...]]
    """By path, the shape of the parameter that is `weight` on disk, as ours is: a kernel, or a norm's scale."""
    biases: Mapping[str, int]
    """By path, the length of the bias, where there is one."""
    names: Mapping[str, str]
    """By every name that is in use, with underscores for dots, the path."""


def layers_of_model(model: Model | ControlNet) -> dict[str, Layers]:
    """By component, the layers of a model as its configurations describe it, whatever is adapted in it already."""
    if isinstance(model, ControlNet):
        return {"controlnet": layers(ControlNet, model.config)}
    encoders = {name: layers(ClipTextEncoder, encoder.config) for name, encoder in model.text_encoders.items()}
    return {"unet": layers(UNet, model.unet.config), **encoders}


def layers_of_family(family: Family) -> dict[str, Layers]:
    """By component, the layers of the published networks of a family."""
    encoders = {name: layers(ClipTextEncoder, config) for name, config in TEXT_ENCODERS[family].items()}
    return {"unet": layers(UNet, UNETS[family]), **encoders}


@functools.lru_cache(maxsize=32)
def layers(kind: Any, config: Any) -> Layers:
    """The layers of a network of this class and configuration."""
    found = slots(abstract(kind, config))
    shapes = {key.removesuffix(".weight"): slot.shape for key, slot in found.items()
              if key.endswith(".weight") and slot.path[-1] in ("kernel", "scale")}  # fmt: skip
    biases = {path: found[f"{path}.bias"].shape[0] for path in shapes if f"{path}.bias" in found}
    names: dict[str, str] = {}
    for path in shapes:
        for name in (path, *_other_names(path)):
            names.setdefault(name.replace(".", "_"), path)
    if kind is not ClipTextEncoder:
        original = original_names(config)
        for path in shapes:
            names.setdefault((rename(path, original) or path).replace(".", "_"), path)
    return Layers(shapes, biases, names)


def original_names(config: Any) -> dict[str, str]:
    """From our paths to those of the original layout, for a UNet or a ControlNet."""
    if isinstance(config, UNetConfig):
        return inverse(unet_names(config.down_block_types, config.up_block_types, config.layers_per_block))
    return inverse(controlnet_names(config.down_block_types, config.layers_per_block))


def _other_names(path: str) -> Iterable[str]:
    """Shorter names that some files have."""
    if path.endswith(".to_out.0"):
        yield path.removesuffix(".0")
    if path.startswith("text_model."):
        inner = path.removeprefix("text_model.")
        yield inner  # newer versions of transformers leave the outermost name out
        stem, _, last = path.rpartition(".")
        if last in OLD_TEXT:
            yield f"{stem}.{OLD_TEXT[last]}"
            yield f"{stem.removeprefix('text_model.')}.{OLD_TEXT[last]}"


def split_name(name: str) -> tuple[str | None, str]:
    """The component that a layer's name in a file tells, if it does, and what follows, with underscores for dots."""
    component = next(component for pattern, component in PREFIXES if pattern.match(name))
    return component, bare(name).replace(".processor.", ".").replace(".", "_")


def bare(name: str) -> str:
    """A layer's name in a file without what stands before it."""
    return name[next(match.end() for pattern, _ in PREFIXES if (match := pattern.match(name))) :]


def find(name: str, components: Mapping[str, Layers]) -> tuple[str, str] | None:
    """The component and path that a layer's name in a file means; None if there is no such layer.

    Names without a component mean the first network that has them. Of a ControlNet alone the UNet's names are those of
    its own layers.
    """
    component, rest = split_name(name)
    if component == "unet" and set(components) == {"controlnet"}:
        component = "controlnet"
    places = components if component is None else [component]
    return next(((place, components[place].names[rest]) for place in places
                 if place in components and rest in components[place].names), None)  # fmt: skip


def is_beyond(name: str, components: Mapping[str, Layers]) -> bool:
    """Whether a name is of the parts of a model that a ControlNet, which is all there is, does not have."""
    component, rest = split_name(name)
    if set(components) != {"controlnet"} or component == "controlnet":
        return False
    return (
        bool(component and component.startswith("text")) or rest.startswith("text_model_") or bool(BEYOND.match(rest))
    )


def nearest(name: str, components: Mapping[str, Layers]) -> str | None:
    """The layer whose name is most like one that was not found, with its component."""
    component, rest = split_name(name)
    if len(rest) > LONGEST:
        return None
    places = [component] if component is not None and component in components else list(components)
    table = {known: f"{place}.{path}" for place in places for known, path in components[place].names.items()}
    rest = re.sub(r"^((lora_)?(unet|te\d?)_)+", "", rest)  # a prefix that is there twice
    words = set(rest.split("_"))
    # Comparing letters takes long for all of a large network, so it is done for those with the most words in common.
    alike = heapq.nsmallest(32, table, key=lambda known: len(words.symmetric_difference(known.split("_"))))
    near = difflib.get_close_matches(rest, alike, n=1, cutoff=0.6)
    return table[near[0]] if near else None


def numbered(
    shapes: Mapping[int, tuple[int, int]], layers: Layers, targets: Sequence[str]
) -> dict[int, str]:  # fmt: skip
    """The paths that cloneofsimo's numbers stand for.

    `shapes` are outputs and inputs by number, `targets` the classes (of `TARGETS`) that the layers were looked for in.
    Of the orders that there were, the one that fits most numbers counts.
    """
    inside = re.compile("|".join(TARGETS[target] for target in targets) or "$^")
    paths = [path for path, shape in layers.shapes.items() if inside.search(path) and len(shape) > 1]

    def order(ranks: Sequence[str]) -> dict[int, str]:
        place = {name: i for i, name in enumerate(ranks)}
        return dict(enumerate(sorted(paths, key=lambda path: [
            int(name) if name.isdigit() else place.get(name, len(place)) for name in path.split(".")])))  # fmt: skip

    def fits(found: Mapping[int, str]) -> int:
        return sum(i in found and layers.shapes[found[i]][:-3:-1] == shape for i, shape in shapes.items())

    return max(map(order, ORDERS), key=fits)
