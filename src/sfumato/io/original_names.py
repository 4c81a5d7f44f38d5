"""The names of the original layout (CompVis ldm, Stability sgm, OpenCLIP) in terms of the diffusers layout.

Every function returns a table from original module paths to ours. The numbers of the original layout follow from the
order in which its layers are built, so the tables are made by walking through a network in that order; `rename`
looks a path up. Each table is one to one: `inverse` turns it round.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

PerLevel = int | Sequence[int]

EMBEDDINGS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "time_embed.cond_proj": "time_embedding.cond_proj",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "nin_shortcut": "conv_shortcut"}
VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
OPEN_CLIP = {
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
}
OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.in_proj_weight": "self_attn.{}.weight", "attn.in_proj_bias": "self_attn.{}.bias",
}  # fmt: skip
"""The fused projections stand for `q_proj`, `k_proj` and `v_proj` in place of the braces."""


def rename(path: str, names: Mapping[str, str]) -> str | None:
    """`path` (of a module, of anything in it, or a whole key) with its longest known beginning replaced.

    None if no beginning of it is in the table.
    """
    head, rest = path, ""
    while head and head not in names:
        head, _, last = head.rpartition(".")
        rest = f".{last}{rest}"
    return names[head] + rest if head else None


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The table from our paths to the original ones."""
    return {ours: theirs for theirs, ours in names.items()}


def unet_names(
    down_block_types: Sequence[str], up_block_types: Sequence[str], layers_per_block: PerLevel
) -> dict[str, str]:
    """The UNet, without the prefix `model.diffusion_model`. The arguments are fields of `UNetConfig`.

    On the way up each level has one layer more, and its last one is followed by the upsampler.
    """
    names = encoder_names(down_block_types, layers_per_block)
    blocks, last = itertools.count(), len(up_block_types) - 1
    for level, kind in enumerate(up_block_types):
        attention, layers = kind.startswith("CrossAttn"), _at(layers_per_block, last - level) + 1
        for layer in range(layers):
            block = f"output_blocks.{next(blocks)}"
            names |= _stage(block, f"up_blocks.{level}", layer, attention)
            if layer == layers - 1 and level < last:
                names[f"{block}.{1 + attention}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names | {"out.0": "conv_norm_out", "out.2": "conv_out"}


def controlnet_names(
    down_block_types: Sequence[str], layers_per_block: PerLevel, hint_layers: int = 6
) -> dict[str, str]:
    """A ControlNet, without the prefix `control_model`; `hint_layers` are the inner ones of its hint block."""
    names = encoder_names(down_block_types, layers_per_block)
    skips = {path.split(".")[1] for path in names if path.startswith("input_blocks.")}
    names |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(len(skips))}
    names["middle_block_out.0"] = "controlnet_mid_block"
    # Convolutions stand at even places of the hint block, activations between them.
    hint = ["conv_in", *(f"blocks.{i}" for i in range(hint_layers)), "conv_out"]
    return names | {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}


def encoder_names(down_block_types: Sequence[str], layers_per_block: PerLevel) -> dict[str, str]:
    """What the UNet and the ControlNet share: down to the middle block."""
    names = EMBEDDINGS | {"input_blocks.0.0": "conv_in"}
    blocks, last = itertools.count(1), len(down_block_types) - 1
    for level, kind in enumerate(down_block_types):
        for layer in range(_at(layers_per_block, level)):
            names |= _stage(f"input_blocks.{next(blocks)}", f"down_blocks.{level}", layer, kind.startswith("CrossAttn"))
        if level < last:
            names[f"input_blocks.{next(blocks)}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    names |= _stage("middle_block", "mid_block", 0, True)
    return names | _inside("middle_block.2", "mid_block.resnets.1", RESNET)


def vae_names(levels: int, layers_per_block: int) -> dict[str, str]:
    """The autoencoder, without the prefix `first_stage_model`. The original numbers the decoder's levels as the
    encoder's: the last one works first."""
    names = {name: name for name in ("quant_conv", "post_quant_conv")}
    for half in ("encoder", "decoder"):
        for same in ("conv_in", "conv_out"):
            names[f"{half}.{same}"] = f"{half}.{same}"
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        for i in range(2):
            names |= _inside(f"{half}.mid.block_{i + 1}", f"{half}.mid_block.resnets.{i}", VAE_RESNET)
        names |= _inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for layer in range(layers_per_block):
            names |= _inside(f"encoder.down.{level}.block.{layer}", f"{down}.resnets.{layer}", VAE_RESNET)
        for layer in range(layers_per_block + 1):
            names |= _inside(f"decoder.up.{level}.block.{layer}", f"{up}.resnets.{layer}", VAE_RESNET)
        if level < levels - 1:
            names[f"encoder.down.{level}.downsample.conv"] = f"{down}.downsamplers.0.conv"
        if level > 0:
            names[f"decoder.up.{level}.upsample.conv"] = f"{up}.upsamplers.0.conv"
    return names


def open_clip_names(layers: int) -> dict[str, str]:
    """The text half of an OpenCLIP model (`cond_stage_model.model`, `conditioner.embedders.1.model`)."""
    names = dict(OPEN_CLIP)
    for i in range(layers):
        names |= _inside(f"transformer.resblocks.{i}", f"text_model.encoder.layers.{i}", OPEN_CLIP_LAYER)
    return names


def ema_name(path: str) -> str:
    """The name of the averaged copy of a UNet's tensor `path`: Lightning buffers may not hold dots."""
    return "model_ema." + f"diffusion_model.{path}".replace(".", "")


def _stage(theirs: str, ours: str, layer: int, attention: bool) -> dict[str, str]:
    """A residual block and the transformer behind it, whose inner names are the same in both layouts."""
    names = _inside(f"{theirs}.0", f"{ours}.resnets.{layer}", RESNET)
    return names | ({f"{theirs}.1": f"{ours}.attentions.{layer}"} if attention else {})


def _inside(theirs: str, ours: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{theirs}.{key}": f"{ours}.{name}" for key, name in names.items()}


def _at(value: PerLevel, level: int) -> int:
    return value if isinstance(value, int) else value[level]
