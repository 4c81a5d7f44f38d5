"""Tiny torch pipelines with random weights, one for each kind of model that people have."""

from __future__ import annotations

import dataclasses as dc
import functools
from pathlib import Path
from typing import Any

from sfumato.model import Model
from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.unet import UNet
from sfumato.text.tokenizer import clip_tokenizer

from models.tiny import CONTROLNETS, ENCODER_ONLY, UNETS
from oracle import fill_from_torch, fresh, seeded

VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "norm_num_groups": 4,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "latent_channels": 4,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "vocab_size": 49408, "hidden_act": "quick_gelu", "eos_token_id": 49407, "bos_token_id": 49406,
}  # fmt: skip
TEXT_2 = TEXT | {"hidden_size": 20, "projection_dim": 20, "hidden_act": "gelu"}
XL_TEXT = TEXT | {"hidden_size": 12}
XL_TEXT_2 = TEXT_2 | {"hidden_size": 20}

SHALLOW = {"layers_per_block": 1}
"""Fewer layers than the networks that are compared by themselves (tests/models): whole programs compile slowly."""


TWO_LEVELS = {
    "block_out_channels": [16, 32], "attention_head_dim": [2, 4], "transformer_layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
"""What shallow networks of SDXL have in place of its three."""


def shallow(unet: str, **changes: Any) -> dict[str, Any]:
    return UNETS[unet] | SHALLOW | (TWO_LEVELS if unet in ("sdxl", "sdxl-inpaint") else {}) | changes


SMALL = {
    "block_out_channels": [16], "layers_per_block": 1, "attention_head_dim": 4, "transformer_layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D"],
}  # fmt: skip
"""Networks of one level, without attention on the way up, for tests that compile many programs."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "sd1": ("StableDiffusionPipeline", shallow("sd1")),
    "sd1-small": ("StableDiffusionPipeline", shallow("sd1") | SMALL),
    "sd1-lcm": ("StableDiffusionPipeline", shallow("lcm")),
    "sd1-inpaint": ("StableDiffusionInpaintPipeline", shallow("sd1-inpaint")),
    "instruct-pix2pix": ("StableDiffusionInstructPix2PixPipeline", shallow("instruct-pix2pix")),
    "sd2": ("StableDiffusionPipeline", shallow("sd2")),
    "sd2-inpaint": ("StableDiffusionInpaintPipeline", shallow("sd2", in_channels=9)),
    "sd2-depth": ("StableDiffusionDepth2ImgPipeline", shallow("sd2-depth")),
    "sdxl": ("StableDiffusionXLPipeline", shallow("sdxl", cross_attention_dim=32)),
    "sdxl-layers": ("StableDiffusionXLPipeline", UNETS["sdxl"] | {"cross_attention_dim": 32}),
    "sdxl-inpaint": ("StableDiffusionXLInpaintPipeline", shallow("sdxl-inpaint", cross_attention_dim=32)),
    "sdxl-instruct": (
        "StableDiffusionXLInstructPix2PixPipeline",
        shallow("sdxl", cross_attention_dim=32, in_channels=8),
    ),
    "sdxl-refiner": ("StableDiffusionXLImg2ImgPipeline", shallow("sdxl-refiner", cross_attention_dim=20)),
}
"""diffusers' pipeline and the UNet of each kind; "sdxl-layers" has as many layers a level as SDXL's files count on."""


@functools.cache
def tokenizer(pad: str, folder: Path) -> Any:
    from transformers import CLIPTokenizer

    clip_tokenizer(pad).save(folder)
    return CLIPTokenizer.from_pretrained(folder)


def torch_pipeline(kind: str, folder: Path) -> Any:
    """The tiny pipeline of a kind; `folder` is a place for its tokenizers' files."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    name, unet = KINDS[kind]
    xl = kind.startswith("sdxl")
    v = kind == "sd2"
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction" if v else "epsilon",
    )  # fmt: skip
    parts: dict[str, Any] = {
        "unet": seeded(lambda: diffusers.UNet2DConditionModel(**unet), 1),
        "vae": seeded(lambda: diffusers.AutoencoderKL(**VAE, scaling_factor=0.13025 if xl else 0.18215), 2),
        "scheduler": scheduler,
        "tokenizer": tokenizer("!" if kind.startswith("sd2") else "<|endoftext|>", folder / "tok"),
        "text_encoder": seeded(lambda: CLIPTextModel(CLIPTextConfig(**(XL_TEXT if xl else TEXT))), 3),
    }
    if xl:
        parts["tokenizer_2"] = tokenizer("!", folder / "tok2")
        parts["text_encoder_2"] = seeded(lambda: CLIPTextModelWithProjection(CLIPTextConfig(**XL_TEXT_2)), 4)
    if kind == "sdxl-refiner":
        parts |= {"tokenizer": None, "text_encoder": None}
    pipeline = getattr(diffusers, name)
    absent = {"safety_checker", "feature_extractor", "image_encoder", "depth_estimator"}
    parts |= dict.fromkeys(absent & set(pipeline.__init__.__annotations__))
    if "requires_safety_checker" in pipeline.__init__.__annotations__:
        parts["requires_safety_checker"] = False
    if kind == "sdxl-refiner":
        parts["requires_aesthetics_score"] = True
    return pipeline(**parts)


def net_config(kind: str) -> dict[str, Any]:
    """Of a tiny ControlNet whose control pictures have twice the size of the latents, as the autoencoder here."""
    config = CONTROLNETS[kind] | SHALLOW | {"conditioning_embedding_out_channels": [8, 12]}
    levels = {key: value for key, value in TWO_LEVELS.items() if key not in ENCODER_ONLY}
    return config | (levels | {"cross_attention_dim": 32} if kind == "sdxl" else {})


def nets(kind: str, count: int = 1, small: bool = False) -> list[tuple[Any, ControlNet]]:
    """Tiny ControlNets of the reference, and the same as ours."""
    from diffusers import ControlNetModel

    config = net_config(kind) | (SMALL_NET if small else {})
    theirs = [seeded(lambda: ControlNetModel(**config), seed) for seed in range(count)]
    return [(net, fill_from_torch(ControlNet, from_dict(ControlNetConfig, config), net)) for net in theirs]


SMALL_NET = {key: value for key, value in SMALL.items() if key not in ENCODER_ONLY}


def small(kind: str, model: Model) -> Model:
    """The tiny model of a kind with a UNet that is smaller still."""
    return dc.replace(model, unet=fresh(UNet, from_dict(UNetConfig, KINDS[kind][1] | SMALL)))


@functools.cache
def small_net(kind: str, seed: int = 0) -> ControlNet:
    """A ControlNet for `small(kind)`."""
    return fresh(ControlNet, from_dict(ControlNetConfig, net_config(kind) | SMALL_NET), seed)
