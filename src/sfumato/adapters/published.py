"""The published networks of each family, so that the names in an adapter mean something without a model at hand."""

from __future__ import annotations

from collections.abc import Mapping

from sfumato.io.family import Family
from sfumato.models.clip import OPEN_CLIP_BIG_G, OPEN_CLIP_H, VIT_L_14, ClipTextConfig
from sfumato.models.config import UNetConfig

XL_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
XL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")

UNETS: Mapping[Family, UNetConfig] = {
    Family.SD1: UNetConfig(cross_attention_dim=768),
    Family.SD2: UNetConfig(
        cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True,
    ),
    Family.SDXL: UNetConfig(
        cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True,
        block_out_channels=(320, 640, 1280), down_block_types=XL_DOWN, up_block_types=XL_UP,
        transformer_layers_per_block=(1, 2, 10), addition_embed_type="text_time", addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
    Family.SDXL_REFINER: UNetConfig(
        cross_attention_dim=1280, attention_head_dim=(6, 12, 24, 24), use_linear_projection=True,
        block_out_channels=(384, 768, 1536, 1536), down_block_types=(*XL_DOWN, "DownBlock2D"),
        up_block_types=("UpBlock2D", *XL_UP), transformer_layers_per_block=4, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2560,
    ),
}  # fmt: skip
"""The UNet of each family, as published; `sample_size`, which has no part in shapes, is left out."""

TEXT_ENCODERS: Mapping[Family, Mapping[str, ClipTextConfig]] = {
    Family.SD1: {"text_encoder": VIT_L_14},
    Family.SD2: {"text_encoder": OPEN_CLIP_H},
    Family.SDXL: {"text_encoder": VIT_L_14, "text_encoder_2": OPEN_CLIP_BIG_G},
    Family.SDXL_REFINER: {"text_encoder_2": OPEN_CLIP_BIG_G},
}
"""The text encoders of each family by component name."""
