"""What a single file leaves unsaid about its family: schedule, tokenizers, sizes, and what the UNet predicts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.io.family import Family
from sfumato.io.lazy import LazyTensor, TensorFile
from sfumato.schedule import PREDICTIONS

SD1, SD2, SDXL, REFINER = Family.SD1, Family.SD2, Family.SDXL, Family.SDXL_REFINER

COMPONENTS = {
    SD1: ("unet", "vae", "text_encoder"),
    SD2: ("unet", "vae", "text_encoder"),
    SDXL: ("unet", "vae", "text_encoder", "text_encoder_2"),
    REFINER: ("unet", "vae", "text_encoder_2"),
}
"""The parts with weights that a family needs."""
SCALING = {SD1: 0.18215, SD2: 0.18215, SDXL: 0.13025, REFINER: 0.13025}
"""The factor of the autoencoder's latents."""
LATENT_CHANNELS = 4
LATENT_SIZE = {SD1: 64, SD2: 96, SDXL: 128, REFINER: 128}
"""Height and width of the latents that a family was trained with; SD 2.x for noise prediction has 64."""
INDEX: Mapping[Family, Mapping[str, Any]] = {
    SD1: {}, SD2: {}, SDXL: {"force_zeros_for_empty_prompt": True},
    REFINER: {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}  # fmt: skip
"""Facts about the whole model, as `model_index.json` has them."""

SCHEDULER = {
    "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading",
}  # fmt: skip
"""The schedule that all families were trained with."""
SAMPLER: Mapping[Family, Mapping[str, Any]] = {
    SD1: {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
    SD2: {"_class_name": "DDIMScheduler"},
    SDXL: {"_class_name": "EulerDiscreteScheduler"},
    REFINER: {"_class_name": "EulerDiscreteScheduler"},
}

CLIP_TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True,
    "bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip
OPEN_CLIP_TOKENIZER = CLIP_TOKENIZER | {"pad_token": "!"}
"""OpenCLIP pads with token 0, which its vocabulary spells "!"."""

SD2_BASE_STEPS = "875000"
"""The `global_step` of the file 512-base-ema.ckpt, Stable Diffusion 2.0 for noise prediction."""
V_WITNESS = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
V_DEVIATION = 0.09
"""In Stable Diffusion 2.x for v prediction the numbers of `V_WITNESS` deviate by more than this (an observation of
ComfyUI's loader); inpainting and depth models of the family predict noise."""


def scheduler_config(
    file: TensorFile, family: Family, unet: Mapping[str, LazyTensor], prediction_type: str | None = None
) -> dict[str, Any]:
    """The `scheduler_config.json` of a single file.

    A model with zero terminal SNR says so by a marker tensor `ztsnr`. Raises SfumatoError if `prediction_type` is
    none that there is.
    """
    config = {**SAMPLER[family], **SCHEDULER, "prediction_type": prediction_type or predicts(file, family, unet)}
    if config["prediction_type"] not in PREDICTIONS:
        raise SfumatoError(f"Unknown prediction type {prediction_type!r}; known are {', '.join(PREDICTIONS)}.")
    if "ztsnr" in file.tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return config


def predicts(file: TensorFile, family: Family, unet: Mapping[str, LazyTensor]) -> str:
    """What the UNet of a single file predicts, by the first witness that speaks: a `.yaml` of the original
    distribution beside the file, the file's metadata, the marker tensor `v_pred` (ComfyUI, NoobAI), for SD 2.x its
    training steps and `V_WITNESS`. Without any it is the noise, as in all SD 1.x and nearly all SDXL models."""
    beside = file.path.with_suffix(".yaml")
    words = beside.read_text(errors="replace") if beside.is_file() else ""
    if "unet_config" in words:
        return "v_prediction" if re.search(r"""parameterization:\s*["']?v\b""", words) else "epsilon"
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        if key in file.metadata:
            return "v_prediction" if file.metadata[key].lower().startswith("v") else "epsilon"
    if "v_pred" in file.tensors or file.metadata.get("modelspec.architecture", "").endswith("768-v"):
        return "v_prediction"
    plain = family is SD2 and V_WITNESS in unet and unet["conv_in.weight"].shape[1] == 4
    if plain and file.metadata.get("global_step") != SD2_BASE_STEPS:
        return "v_prediction" if unet[V_WITNESS].read().astype(np.float64).std() > V_DEVIATION else "epsilon"
    return "epsilon"
