"""Weights that are something else are told by name."""

from __future__ import annotations

import pytest

from sfumato.errors import FileError
from sfumato.io.foreign import foreign
from sfumato.io.single_file import read_single_file

from published import checkpoint, file_of, old, stub


@pytest.mark.parametrize(("key", "what"), [
    ("lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.weight", "a ControlNet-LLLite"),
    ("lora_controlnet", "a Control-LoRA"),
    ("difference", "a ControlNet stored as a difference"),
    ("body.0.in_conv.weight", "a T2I-Adapter"),
    ("adapter.body.0.resnets.0.block1.weight", "a T2I-Adapter"),
    ("task_embedding", "a ControlNet Union"),
    ("image_proj.proj.weight", "an IP-Adapter"),
    ("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight", "a LoRA"),
    ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.down.weight", "a LoRA"),
    ("emb_params", "a textual inversion embedding"),
    ("low_res_scale_model.betas", "the Stable Diffusion x4 upscaler"),
    ("noise_augmentor.data_mean", "a Stable unCLIP checkpoint"),
    ("edm_mean", "Playground"),
    ("edm_vpred.sigma_max", "CosXL"),
    ("model.diffusion_model.input_blocks.1.1.time_stack.0.attn1.to_k.weight", "a Stable Video Diffusion checkpoint"),
    ("model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight", "a Stable Diffusion 3 checkpoint"),
    ("double_blocks.0.img_attn.norm.key_norm.scale", "a Flux checkpoint"),
    ("down_blocks.0.motion_modules.0.temporal_transformer.norm.bias", "an AnimateDiff motion module"),
])  # fmt: skip
def test_other_things_are_named(key, what):
    with pytest.raises(FileError, match=what):
        read_single_file(file_of({"input_blocks.0.0.weight": stub((1,)), key: stub((1,))}))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1", "sd2-depth", "sdxl", "sdxl-refiner"])
def test_checkpoints_and_controlnets_are_nothing_else(name):
    assert foreign(checkpoint(name)) is None
    assert foreign(old("controlnet", "sd1", "control_model.")) is None
