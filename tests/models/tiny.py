"""Tiny configurations of every family, in the format's own JSON terms: one table for all tests."""

from __future__ import annotations

from typing import Any

SD1 = {
    "block_out_channels": [32, 64], "layers_per_block": 2, "cross_attention_dim": 24, "attention_head_dim": 4,
    "norm_num_groups": 8, "in_channels": 4, "out_channels": 4, "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}  # fmt: skip
SD2 = SD1 | {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True}
SDXL = SD1 | {
    "block_out_channels": [16, 32, 64], "attention_head_dim": [2, 4, 8], "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 1, 2], "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 20 + 6 * 8,
}  # fmt: skip
REFINER = SDXL | {
    "block_out_channels": [16, 32, 48, 64], "attention_head_dim": [2, 4, 6, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": 2, "projection_class_embeddings_input_dim": 20 + 5 * 8,
}  # fmt: skip
POOLED = SD1 | {"addition_embed_type": "text", "addition_embed_type_num_heads": 4, "layers_per_block": 1}

UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1,
    "sd1-inpaint": SD1 | {"in_channels": 9},
    "instruct-pix2pix": SD1 | {"in_channels": 8},
    "sd2": SD2,
    "sd2-depth": SD2 | {"in_channels": 5},
    "sdxl": SDXL,
    "sdxl-inpaint": SDXL | {"in_channels": 9},
    "sdxl-refiner": REFINER,
    "text-pooled": POOLED,
    "lcm": SD1 | {"time_cond_proj_dim": 12},
    "uneven": SD1 | {"layers_per_block": [1, 2], "freq_shift": 1, "flip_sin_to_cos": False},
    "no-attention-below": SD1 | {"mid_block_type": "UNetMidBlock2D"},
}
"""The UNets that must agree with the reference."""

ENCODER_ONLY = ("up_block_types", "out_channels", "sample_size")
HINT = {"conditioning_embedding_out_channels": [8, 12, 16, 24]}


def controlnet(unet: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The configuration of a ControlNet for a UNet."""
    return {k: v for k, v in unet.items() if k not in ENCODER_ONLY} | HINT | changes


CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd1": controlnet(SD1),
    "sd2": controlnet(SD2),
    "sdxl": controlnet(SDXL),
    "bgr": controlnet(SD1, controlnet_conditioning_channel_order="bgr"),
    "shuffle": controlnet(SD1, global_pool_conditions=True),
    "gray": controlnet(SD1, conditioning_channels=1),
}
"""The ControlNets that must agree with the reference."""
