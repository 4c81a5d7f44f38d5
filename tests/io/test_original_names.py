"""The names of the original layout: against the torch reference for every key of every published model."""

from __future__ import annotations

import pytest

from sfumato.io.original_names import (
    controlnet_names,
    ema_name,
    inverse,
    open_clip_names,
    rename,
    unet_names,
    vae_names,
)

import published


def unet_table(config: dict) -> dict[str, str]:
    return unet_names(config["down_block_types"], config["up_block_types"], 2)


@pytest.mark.parametrize(("name", "theirs", "ours"), [
    ("sd1", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
     "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
    ("sd1", "input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
    ("sd1", "middle_block.1.proj_in.weight", "mid_block.attentions.0.proj_in.weight"),
    ("sd1", "output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
    ("sd1", "output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
    ("sd1", "output_blocks.11.0.skip_connection.weight", "up_blocks.3.resnets.2.conv_shortcut.weight"),
    ("sdxl", "input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.bias",
     "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj.bias"),
    ("sdxl", "label_emb.0.2.weight", "add_embedding.linear_2.weight"),
    ("sdxl", "output_blocks.8.0.emb_layers.1.bias", "up_blocks.2.resnets.2.time_emb_proj.bias"),
    ("sdxl-refiner", "input_blocks.11.0.in_layers.2.weight", "down_blocks.3.resnets.1.conv1.weight"),
])  # fmt: skip
def test_known_names(name, theirs, ours):
    names = unet_table(published.UNETS[name])
    assert rename(theirs, names) == ours
    assert rename(ours, inverse(names)) == theirs
    module, there = theirs.rpartition(".")[0], ours.rpartition(".")[0]  # as adapters name their places
    assert rename(module, names) == there


@pytest.mark.parametrize("path", ["", "foo.weight", "input_blocks.1.0.extra.weight", "input_blocks.40.0.op.weight"])
def test_unknown_paths_have_no_name(path):
    assert rename(path, unet_table(published.SD1)) is None


def test_tables_are_one_to_one():
    for names in (
        *(unet_table(config) for config in published.UNETS.values()),
        controlnet_names(published.SD1["down_block_types"], [2, 2, 2, 2]), vae_names(4, 2), vae_names(3, 1),
        unet_names(["DownBlock2D", "CrossAttnDownBlock2D"], ["CrossAttnUpBlock2D", "UpBlock2D"], [1, 3]),
        open_clip_names(24),
    ):  # fmt: skip
        assert len(set(names.values())) == len(names)
        assert inverse(inverse(names)) == names


def test_averaged_names():
    assert ema_name("input_blocks.0.0.weight") == "model_ema.diffusion_modelinput_blocks00weight"


@pytest.mark.parity
@pytest.mark.parametrize("name", published.UNETS)
def test_every_unet_key_as_the_reference(name):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    ours, config = published.state("unet", name), published.UNETS[name]
    names = unet_table(config)
    original = {f"model.diffusion_model.{rename(key, inverse(names))}": key for key in ours}
    assert len(original) == len(ours) > 600
    theirs = convert_ldm_unet_checkpoint(dict(original), {"layers_per_block": 2, **config})
    assert theirs == {key: key for key in ours}
    for old, key in original.items():
        assert rename(old.removeprefix("model.diffusion_model."), names) == key
    averaged = {ema_name(old.removeprefix("model.diffusion_model.")): key for old, key in original.items()}
    both = dict.fromkeys(original) | averaged
    assert convert_ldm_unet_checkpoint(both, {"layers_per_block": 2, **config}, extract_ema=True) == theirs


@pytest.mark.parity
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_every_controlnet_key_as_the_reference(name):
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    ours = published.state("controlnet", name)
    names = controlnet_names(published.CONTROLNETS[name]["down_block_types"], 2)
    original = {f"control_model.{rename(key, inverse(names))}": key for key in ours}
    assert len(original) == len(ours) > 300
    assert convert_controlnet_checkpoint(original, {"layers_per_block": 2}) == {key: key for key in ours}


@pytest.mark.parity
def test_every_vae_key_as_the_reference():
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours, names = published.state("vae", "vae"), vae_names(4, 2)
    original = {f"first_stage_model.{rename(key, inverse(names))}": key for key in ours}
    assert len(original) == len(ours) == 248
    marked = {key: torch.full((1,), i) for i, key in enumerate(original)}
    keys = list(original.values())
    theirs = {key: keys[int(mark)] for key, mark in convert_ldm_vae_checkpoint(marked, published.VAE).items()}
    assert theirs == {key: key for key in ours}
