"""Numbers of the original layout: those that the torch reference's own conversion gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sfumato.io import defaults
from sfumato.io.lazy import LazyTensor
from sfumato.io.original_names import inverse, rename, unet_names, vae_names
from sfumato.io.single_file import read_single_file
from sfumato.io.tensors import open_tensors

import published
from published import file_of


@pytest.mark.parity
def test_open_clip_numbers_as_the_reference():
    """Fused projections split, the last projection turned: the very numbers that diffusers makes of them."""
    import torch
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    stem, width = "conditioner.embedders.1.model.", 8
    shapes = {
        "token_embedding.weight": (11, width),
        "positional_embedding": (7, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, 6),
    }
    for i in range(2):
        for key, shape in {
            "ln_1.weight": (width,), "ln_1.bias": (width,), "ln_2.weight": (width,), "ln_2.bias": (width,),
            "attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,),
            "attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,),
            "mlp.c_fc.weight": (4 * width, width), "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (width, 4 * width), "mlp.c_proj.bias": (width,),
        }.items():  # fmt: skip
            shapes[f"transformer.resblocks.{i}.{key}"] = shape
    state = {stem + key: torch.randn(shape) for key, shape in shapes.items()}
    model = CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=6,
            vocab_size=11,
            max_position_embeddings=7,
        )
    )
    theirs = convert_open_clip_checkpoint(model, state, prefix=stem)
    parts = read_single_file(file_of({key: LazyTensor.of(value.numpy()) for key, value in state.items()}))
    ours = parts.tensors["text_encoder_2"]
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert tensor.shape == tuple(theirs[key].shape)
        np.testing.assert_array_equal(tensor.read(), theirs[key].numpy())


@pytest.mark.parity
def test_autoencoder_numbers_as_the_reference():
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    config = published.VAE | {"block_out_channels": [32, 64], "down_block_types": ["DownEncoderBlock2D"] * 2,
                              "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1}  # fmt: skip
    state = diffusers.AutoencoderKL(**config).state_dict()
    names = inverse(vae_names(2, 1))
    original = {
        f"first_stage_model.{rename(key, names)}": value[..., None, None]
        if "attentions" in key and value.ndim == 2
        else value
        for key, value in state.items()
    }
    theirs = convert_ldm_vae_checkpoint(original, config)
    ours = read_single_file(file_of({k: LazyTensor.of(v.numpy()) for k, v in original.items()})).tensors["vae"]
    assert set(ours) == set(theirs)
    for key, tensor in ours.items():
        assert tensor.shape == tuple(theirs[key].shape)
        np.testing.assert_array_equal(tensor.read(), theirs[key].numpy())


@pytest.mark.parity
def test_a_tiny_unet_of_the_original_layout_computes_as_the_reference(tmp_path):
    """By way of a .ckpt file as Lightning writes it."""
    import diffusers
    import jax.numpy as jnp
    import torch

    from sfumato.io.fill import fill
    from sfumato.models.config import UNetConfig, from_dict
    from sfumato.models.layers import abstract
    from sfumato.models.unet import UNet
    from sfumato.types import Conditioning

    from oracle import assert_close, from_torch, seeded, to_torch

    config: dict[str, Any] = {
        "block_out_channels": [32, 64], "cross_attention_dim": 768, "attention_head_dim": 8, "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }  # fmt: skip
    theirs = seeded(lambda: diffusers.UNet2DConditionModel(**config))
    names = inverse(unet_names(config["down_block_types"], config["up_block_types"], 1))
    stored = {f"model.diffusion_model.{rename(key, names)}": value for key, value in theirs.state_dict().items()}
    torch.save({"epoch": 1, "global_step": 875000, "state_dict": stored}, tmp_path / "model.ckpt")
    file = open_tensors(tmp_path / "model.ckpt")
    assert file.metadata["global_step"] == defaults.SD2_BASE_STEPS
    parts = read_single_file(file)
    ours = fill(abstract(UNet, from_dict(UNetConfig, parts.configs["unet"])), parts.tensors["unet"])
    rng = np.random.default_rng(0)
    x, context = rng.standard_normal((2, 8, 8, 4), np.float32), rng.standard_normal((2, 5, 768), np.float32)
    with torch.no_grad():
        expected = theirs(to_torch(x), torch.tensor([7, 500]), torch.from_numpy(context)).sample
    got = ours(jnp.asarray(x), jnp.array([7.0, 500.0]), Conditioning(jnp.asarray(context))).eps
    assert_close(got, from_torch(expected))
