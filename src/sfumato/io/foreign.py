"""Weights that look like something sfumato loads and are something else: what to tell whoever has them."""

from __future__ import annotations

import re
from collections.abc import Iterable

FOREIGN: tuple[tuple[str, str], ...] = (
    (r"lllite_", "a ControlNet-LLLite"),
    (r"lora_controlnet$", "a Control-LoRA"),
    (r"difference$", "a ControlNet stored as a difference to its base model"),
    (r"(adapter\.)?body\.\d+\.(in_conv|block1|resnets\.0\.block1)\.", "a T2I-Adapter"),
    (r"(task_embedding|control_add_embedding\.linear_1\.weight|control_type_proj\.)", "a ControlNet Union"),
    (r"(ip_adapter|image_proj)\.", "an IP-Adapter"),
    (r"(unet\.)?(down_blocks|up_blocks|mid_block)\S*motion_modules\.", "an AnimateDiff motion module"),
    (r"(lora_(unet|te\d?)_|lycoris_|unet\.\S*lora|\S+\.(lora_(up|down|A|B)|processor)\.)", "a LoRA"),
    (r"(emb_params|string_to_param|clip_[lg])$", "a textual inversion embedding"),
    (r"(model\.diffusion_model\.)?position_net\.", "a GLIGEN checkpoint"),
    (r"low_res_scale_model\.|(model\.diffusion_model\.)?label_emb\.weight$", "the Stable Diffusion x4 upscaler"),
    (r"(embedder|noise_augmentor)\.", "a Stable unCLIP checkpoint"),
    (r"\S*\.time_stack\.|\S*\.time_mixer\.", "a Stable Video Diffusion checkpoint"),
    (r"edm_(mean|std)$", "a checkpoint of EDM diffusion (Playground v2.5)"),
    (r"edm_vpred\.", "a checkpoint of EDM diffusion (CosXL)"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 checkpoint"),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a Flux checkpoint"),
    (r"(model\.diffusion_model\.)?(clip_txt_mapper|down_blocks\.\d+\.\d+\.channelwise)\.", "a Stable Cascade model"),
)
"""Beginnings of keys (as regular expressions) that only these have. The first that matches counts."""


def foreign(keys: Iterable[str]) -> str | None:
    """What a file with these keys is, if it is one of the known things that are no checkpoint or ControlNet."""
    keys = list(keys)
    for pattern, what in FOREIGN:
        if any(map(re.compile(pattern).match, keys)):
            return what
    return None
