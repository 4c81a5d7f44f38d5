"""The published configurations, and models and files of them without numbers, in the diffusers and original layouts."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sfumato.io.original_names import controlnet_names, inverse, open_clip_names, rename, unet_names, vae_names
from sfumato.io.tensors import LazyTensor, TensorFile

Tensors = dict[str, LazyTensor]

SD1 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}  # fmt: skip
SD2 = SD1 | {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True, "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
REFINER = SDXL | {
    "cross_attention_dim": 1280, "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536], "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd1": SD1, "sd1-inpaint": SD1 | {"in_channels": 9}, "sd1-pix2pix": SD1 | {"in_channels": 8},
    "sd2": SD2, "sd2-depth": SD2 | {"in_channels": 5, "sample_size": 64}, "sdxl": SDXL, "sdxl-refiner": REFINER,
}  # fmt: skip

XL_NET = {k: v for k, v in SDXL.items() if k not in ("sample_size", "up_block_types")}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "sd1": {k: v for k, v in SD1.items() if k not in ("sample_size", "up_block_types")},
    "sd2": {k: v for k, v in SD2.items() if k not in ("sample_size", "up_block_types")},
    "sdxl": XL_NET,
    "sdxl-mid": XL_NET | {"transformer_layers_per_block": [1, 0, 1]},
    "sdxl-small": XL_NET | {"down_block_types": ["DownBlock2D"] * 3, "mid_block_type": "UNetMidBlock2D",
                            "transformer_layers_per_block": 1},
}  # fmt: skip

VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
}  # fmt: skip
CLIP_L = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408, "hidden_act": "quick_gelu",
}  # fmt: skip
OPEN_CLIP_H = CLIP_L | {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16,
    "projection_dim": 1024,
    "hidden_act": "gelu",
}  # fmt: skip
OPEN_CLIP_G = CLIP_L | {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "hidden_act": "gelu",
}  # fmt: skip
"""With a projection, unlike the other two."""


@functools.cache
def state(kind: str, name: str) -> dict[str, LazyTensor]:
    """The tensors of a torch reference model by key, with shapes and without numbers."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        if kind == "unet":
            module = diffusers.UNet2DConditionModel(**UNETS[name])
        elif kind == "controlnet":
            module = diffusers.ControlNetModel(**CONTROLNETS[name])
        elif kind == "vae":
            module = diffusers.AutoencoderKL(**VAE)
        else:
            made = CLIPTextModelWithProjection if name == "OPEN_CLIP_G" else CLIPTextModel
            module = made(CLIPTextConfig(**globals()[name]))
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    if kind == "text":  # newer versions of transformers leave the outermost name out
        shapes = {k if k.startswith("text_") else f"text_model.{k}": shape for k, shape in shapes.items()}
    return {key: stub(shape) for key, shape in shapes.items() if not key.endswith("position_ids")}


def stub(shape: tuple[int, ...]) -> LazyTensor:
    """A tensor of zeros that takes no memory."""
    dtype = np.dtype(ml_dtypes.bfloat16)
    return LazyTensor(shape, dtype, lambda: np.broadcast_to(np.zeros((), dtype), shape))


def file_of(tensors: Mapping[str, LazyTensor], path: str = "some.safetensors", **metadata: str) -> TensorFile:
    return TensorFile(Path(path), tensors, metadata, "safetensors")


def old(kind: str, name: str, prefix: str) -> Tensors:
    """A published network with the names and shapes of the original layout."""
    found = state(kind, name)
    if kind == "text":
        return old_text(found, prefix)
    if kind == "unet":
        config = UNETS[name]
        names = unet_names(config["down_block_types"], config["up_block_types"], 2)
    elif kind == "controlnet":
        names = controlnet_names(CONTROLNETS[name]["down_block_types"], 2)
    else:
        names = vae_names(4, 2)
        found = {k: stub((*t.shape, 1, 1)) if "attentions" in k and len(t.shape) == 2 else t for k, t in found.items()}
    names = inverse(names)
    return {f"{prefix}{rename(key, names)}": tensor for key, tensor in found.items()}


def old_text(tensors: Tensors, prefix: str) -> Tensors:
    """A text encoder as OpenCLIP has it."""
    found = {}
    names = inverse(open_clip_names(40))
    for key, tensor in tensors.items():
        if ".q_proj." in key:
            path = key.replace("q_proj", "{}")
            found[f"{prefix}{names[path]}"] = stub((3 * tensor.shape[0], *tensor.shape[1:]))
        elif "k_proj" not in key and "v_proj" not in key:
            found[f"{prefix}{rename(key, names)}"] = tensor
    return found


def clip_l(prefix: str) -> Tensors:
    return {f"{prefix}{key}": tensor for key, tensor in state("text", "CLIP_L").items()}


BUFFERS = dict.fromkeys(
    ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod",
     "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "logvar",
     "posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2",
     "model_ema.decay", "model_ema.num_updates", "denoiser.sigmas"),
    stub((1000,)),
)  # fmt: skip


def checkpoint(name: str) -> Tensors:
    """A whole published checkpoint with all that circulates in such files."""
    tensors = old("unet", name, "model.diffusion_model.") | old("vae", "vae", "first_stage_model.") | BUFFERS
    if name.startswith("sd1"):
        stem = "cond_stage_model.transformer."
        return tensors | clip_l(stem) | {f"{stem}text_model.embeddings.position_ids": stub((1, 77))}
    if name.startswith("sd2"):
        stem = "cond_stage_model.model."
        tensors |= old("text", "OPEN_CLIP_H", stem)
        last = {key.replace("resblocks.22", "resblocks.23"): t for key, t in tensors.items() if "resblocks.22" in key}
        return tensors | last | {f"{stem}text_projection": stub((1024, 1024)), f"{stem}logit_scale": stub(())}
    stem = f"conditioner.embedders.{'01'[name == 'sdxl']}.model."
    tensors |= old("text", "OPEN_CLIP_G", stem) | {f"{stem}logit_scale": stub(())}
    return tensors | (clip_l("conditioner.embedders.0.transformer.") if name == "sdxl" else {})
