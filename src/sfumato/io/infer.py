"""Configurations read off the shapes of tensors (by their diffusers keys), in the terms of diffusers' JSON files.

Few things do not show in shapes. They are the same for all models of the families that sfumato knows: heads are 64
wide, except that SD 1.x (whose transformers begin with a convolution) has 8 of them at every level.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

from sfumato.errors import MismatchError
from sfumato.io.lazy import LazyTensor

Tensors: TypeAlias = Mapping[str, LazyTensor]

HEAD_WIDTH = 64
SD1_HEADS = 8
SIZE_EMBEDDING = 256
"""Width of the embedding of each of SDXL's size numbers (arXiv:2307.01952, section 2.2)."""
CONTEXT_OF = {2816: 2048, 2560: 1280}
"""Width of the text features by the width of what is added to the time, for SDXL networks without attention."""


def unet_config(tensors: Tensors) -> dict[str, Any]:
    """A UNet's `config.json`. Raises MismatchError if a tensor that tells its structure is not there."""
    config = _encoder(tensors, "UNet") | {
        "_class_name": "UNet2DConditionModel", "out_channels": _shape(tensors, "conv_out.weight", "UNet")[0],
    }  # fmt: skip
    config["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(config["down_block_types"])]
    if "time_embedding.cond_proj.weight" in tensors:
        config["time_cond_proj_dim"] = tensors["time_embedding.cond_proj.weight"].shape[1]
    return config


def controlnet_config(tensors: Tensors) -> dict[str, Any]:
    """A ControlNet's `config.json`. Raises as `unet_config`."""
    hint = "controlnet_cond_embedding"
    first = _shape(tensors, f"{hint}.conv_in.weight", "ControlNet")
    blocks = _count(tensors, hint + ".blocks.{}.weight")
    wider = [tensors[f"{hint}.blocks.{i}.weight"].shape[0] for i in range(1, blocks, 2)]
    return _encoder(tensors, "ControlNet") | {
        "_class_name": "ControlNetModel", "conditioning_channels": first[1],
        "conditioning_embedding_out_channels": [first[0], *wider],
    }  # fmt: skip


def vae_config(tensors: Tensors) -> dict[str, Any]:
    """An autoencoder's `config.json` but for its scaling factor, which does not show. Raises as `unet_config`."""
    _shape(tensors, "encoder.down_blocks.0.resnets.0.conv1.weight", "autoencoder")
    levels = _count(tensors, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    channels = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(tensors, "encoder.conv_in.weight", "autoencoder")[1],
        "out_channels": _shape(tensors, "decoder.conv_out.weight", "autoencoder")[0],
        "latent_channels": _shape(tensors, "decoder.conv_in.weight", "autoencoder")[1],
        "block_out_channels": channels,
        "layers_per_block": _count(tensors, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        "mid_block_add_attention": "encoder.mid_block.attentions.0.to_q.weight" in tensors,
    }


def text_config(tensors: Tensors, *, activation: str) -> dict[str, Any]:
    """A CLIP text encoder's `config.json`; `activation` is "quick_gelu" for OpenAI's, "gelu" for OpenCLIP's.

    Raises as `unet_config`.
    """
    stem = "text_model.embeddings."
    tokens, width = _shape(tensors, stem + "token_embedding.weight", "text encoder")
    projection = tensors.get("text_projection.weight")
    return {
        "model_type": "clip_text_model",
        "architectures": ["CLIPTextModelWithProjection" if projection else "CLIPTextModel"],
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": _shape(tensors, "text_model.encoder.layers.0.mlp.fc1.weight", "text encoder")[0],
        "num_hidden_layers": _count(tensors, "text_model.encoder.layers.{}.mlp.fc1.weight"),
        "num_attention_heads": max(1, width // HEAD_WIDTH),
        "max_position_embeddings": _shape(tensors, stem + "position_embedding.weight", "text encoder")[0],
        "hidden_act": activation,
        "projection_dim": projection.shape[0] if projection else width,
    }


def _encoder(tensors: Tensors, what: str) -> dict[str, Any]:
    """What UNets and ControlNets have in common."""
    inputs = _shape(tensors, "conv_in.weight", what)[1]
    _shape(tensors, "down_blocks.0.resnets.0.conv1.weight", what)
    levels = _count(tensors, "down_blocks.{}.resnets.0.conv1.weight")
    channels = [tensors[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
    layers = [_count(tensors, f"down_blocks.{i}.resnets." + "{}.conv1.weight") for i in range(levels)]
    attends, depths = zip(*(_attention(tensors, f"down_blocks.{i}") for i in range(levels)), strict=True)
    mid_attends, mid_depth = _attention(tensors, "mid_block")
    # The middle block is as deep as the last level; where there is no attention any depth will do.
    depths = depths if attends[-1] else (*depths[:-1], mid_depth)
    told = {depth for depth, here in zip(depths, (*attends[:-1], attends[-1] or mid_attends), strict=True) if here}
    config: dict[str, Any] = {
        "in_channels": inputs,
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if here else "DownBlock2D" for here in attends],
        "mid_block_type": "UNetMidBlock2DCrossAttn" if mid_attends else "UNetMidBlock2D",
        "layers_per_block": layers[0] if len(set(layers)) == 1 else layers,
        "transformer_layers_per_block": list(depths) if len(told) > 1 else (*told, 1)[0],
    }
    width = next((t.shape[1] for key, t in tensors.items() if key.endswith(".attn2.to_k.weight")), None)
    if width is not None:
        config["cross_attention_dim"] = width
    linear = next((len(t.shape) == 2 for key, t in tensors.items() if key.endswith(".proj_in.weight")), True)
    config["use_linear_projection"] = linear
    config["attention_head_dim"] = [max(1, c // HEAD_WIDTH) for c in channels] if linear else SD1_HEADS
    if "add_embedding.linear_1.weight" in tensors:
        added = tensors["add_embedding.linear_1.weight"].shape[1]
        config |= {
            "addition_embed_type": "text_time", "addition_time_embed_dim": SIZE_EMBEDDING,
            "projection_class_embeddings_input_dim": added,
        }  # fmt: skip
        config.setdefault("cross_attention_dim", CONTEXT_OF.get(added))
    return config


def _attention(tensors: Tensors, place: str) -> tuple[bool, int]:
    """Whether a level has attention, and the number of transformer blocks in it (1 without attention)."""
    here = f"{place}.attentions.0.norm.weight" in tensors
    return here, _count(tensors, f"{place}.attentions.0.transformer_blocks." + "{}.norm1.weight") if here else 1


def _shape(tensors: Tensors, key: str, what: str) -> tuple[int, ...]:
    if key not in tensors:
        raise MismatchError(f"The {what} is not whole: it has no tensor {key}.")
    return tensors[key].shape


def _count(tensors: Tensors, key: str) -> int:
    """How many of `key` there are with 0, 1, ... in place of its braces."""
    return next(i for i in itertools.count() if key.format(i) not in tensors)
