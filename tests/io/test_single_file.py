"""Single files: every published kind comes apart into what diffusers has in folders."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from flax import nnx

from sfumato.errors import FileError, MismatchError
from sfumato.io.lazy import LazyTensor
from sfumato.io.original_names import controlnet_names, ema_name, inverse, rename, unet_names, vae_names
from sfumato.io.single_file import Parts, read_single_file

import published
from published import Tensors, checkpoint, file_of, old, old_text, stub

TEXTS = {
    "sd1": {"text_encoder": "CLIP_L"}, "sd2": {"text_encoder": "OPEN_CLIP_H"},
    "sdxl": {"text_encoder": "CLIP_L", "text_encoder_2": "OPEN_CLIP_G"},
    "sdxl-refiner": {"text_encoder_2": "OPEN_CLIP_G"},
}  # fmt: skip


def same(ours: Mapping[str, LazyTensor], theirs: Mapping[str, LazyTensor]) -> None:
    assert {key: tensor.shape for key, tensor in ours.items()} == {key: tensor.shape for key, tensor in theirs.items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", published.UNETS)
def test_published_checkpoints(name):
    """Every key and shape of the torch models, and the published configurations, nothing missing or left over."""
    parts = read_single_file(file_of(checkpoint(name)))
    family = parts.family
    assert family is not None
    assert name.startswith(family)
    assert parts.missing == ()
    assert set(parts.tensors) == {"unet", "vae", *TEXTS[family]}
    same(parts.tensors["unet"], published.state("unet", name))
    same(parts.tensors["vae"], published.state("vae", "vae"))
    for component, text in TEXTS[family].items():
        same(parts.tensors[component], published.state("text", text))
        expected = getattr(published, text)
        assert {key: parts.configs[component][key] for key in expected} == expected
        assert parts.configs[component]["architectures"] == [
            "CLIPTextModelWithProjection" if text == "OPEN_CLIP_G" else "CLIPTextModel"
        ]
        pad = "<|endoftext|>" if text == "CLIP_L" else "!"
        assert parts.configs[component.replace("text_encoder", "tokenizer")]["pad_token"] == pad
    expected = published.UNETS[name] | ({"sample_size": 64} if family == "sd2" else {})  # no witness of v here
    assert {key: parts.configs["unet"][key] for key in expected} == expected
    assert {key: parts.configs["vae"][key] for key in published.VAE} == published.VAE
    assert parts.configs["index"].get("force_zeros_for_empty_prompt", False) is (family == "sdxl")
    assert parts.configs["vae"]["scaling_factor"] == (0.13025 if family.startswith("sdxl") else 0.18215)


@pytest.mark.parity
@pytest.mark.parametrize("name", published.UNETS)
def test_configurations_build_what_the_file_holds(name):
    """Our networks, built by the configurations that were read off the shapes, have just the tensors' shapes."""
    from sfumato.io.fill import slots
    from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
    from sfumato.models.config import UNetConfig, from_dict
    from sfumato.models.layers import abstract
    from sfumato.models.unet import UNet
    from sfumato.models.vae import AutoencoderKL, VAEConfig
    from sfumato.schedule import Schedule

    parts = read_single_file(file_of(checkpoint(name)))
    kinds = {"unet": (UNet, UNetConfig), "vae": (AutoencoderKL, VAEConfig), "text": (ClipTextEncoder, ClipTextConfig)}
    for component, tensors in parts.tensors.items():
        network, config = kinds[component.split("_")[0]]
        made = abstract(network, from_dict(config, parts.configs[component]))
        assert {key: slot.stored for key, slot in slots(made).items()} == {key: t.shape for key, t in tensors.items()}
    assert Schedule.from_config(parts.configs["scheduler"]).timesteps(20)[0] == 951


@pytest.mark.parity
@pytest.mark.parametrize("prefix", ["control_model.", ""])
@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_original_controlnets(name, prefix):
    parts = read_single_file(file_of(old("controlnet", name, prefix)))
    check_controlnet(parts, name)


@pytest.mark.parity
@pytest.mark.parametrize("name", published.CONTROLNETS)
def test_controlnets_of_the_diffusers_layout(name):
    check_controlnet(read_single_file(file_of(published.state("controlnet", name))), name)


def check_controlnet(parts: Parts, name: str) -> None:
    assert parts.family == name.partition("-")[0]
    assert set(parts.tensors) == {"controlnet"}
    same(parts.tensors["controlnet"], published.state("controlnet", name))
    config, expected = parts.configs["controlnet"], published.CONTROLNETS[name]
    assert {key: config[key] for key in expected} == expected
    assert config["conditioning_embedding_out_channels"] == [16, 32, 96, 256]
    assert (config["conditioning_channels"], config["global_pool_conditions"]) == (3, False)


def test_the_net_that_averages_is_known_by_name():
    tensors = published.state("controlnet", "sd1")
    for path, averages in (
        ("control_v11e_sd15_shuffle.pth", True),
        ("x_shuffle_fp16.safetensors", True),
        ("shuffled.safetensors", False),
    ):
        parts = read_single_file(file_of(tensors, path))
        assert parts.configs["controlnet"]["global_pool_conditions"] is averages


def test_a_checkpoint_with_its_controlnet_has_both():
    parts = read_single_file(file_of(checkpoint("sd1") | old("controlnet", "sd1", "control_model.")))
    assert {"unet", "controlnet"} < set(parts.tensors)
    assert parts.missing == ()


@pytest.mark.parametrize(("tensors", "missing"), [
    (lambda: old("unet", "sd1", "model.diffusion_model."), ("vae", "text_encoder")),
    (lambda: old("unet", "sdxl", ""), ("vae", "text_encoder", "text_encoder_2")),
    (lambda: published.state("unet", "sd2"), ("vae", "text_encoder")),
    (lambda: {k: t for k, t in checkpoint("sd1").items() if not k.startswith("first_stage")}, ("vae",)),
    (lambda: {k: t for k, t in checkpoint("sdxl").items() if "embedders.1" not in k}, ("text_encoder_2",)),
])  # fmt: skip
def test_missing_parts_are_named(tensors, missing):
    parts = read_single_file(file_of(tensors()))
    assert parts.missing == missing
    assert "scheduler" in parts.configs


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae."])
def test_lone_autoencoders(prefix):
    original = old("vae", "vae", prefix) | {f"{prefix}loss.logvar": stub(()), f"{prefix}model_ema.decay": stub(())}
    for tensors in (original, {f"{prefix}{k}": t for k, t in published.state("vae", "vae").items()}):
        parts = read_single_file(file_of(tensors))
        assert (parts.family, parts.missing, set(parts.tensors)) == (None, (), {"vae"})
        same(parts.tensors["vae"], published.state("vae", "vae"))


def test_early_names_of_the_diffusers_autoencoder():
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = published.state("vae", "vae")
    tensors = {}
    for key, tensor in state.items():
        for new, name in early.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        tensors[key] = tensor
    assert set(tensors) != set(state)
    same(read_single_file(file_of(tensors)).tensors["vae"], state)


def test_early_clip_lacks_the_outermost_name():
    tensors = {key.replace("transformer.text_model.", "transformer."): t for key, t in checkpoint("sd1").items()}
    same(read_single_file(file_of(tensors)).tensors["text_encoder"], published.state("text", "CLIP_L"))


def test_sd2_in_the_sgm_layout_and_with_23_layers():
    state = published.state("text", "OPEN_CLIP_H")
    for stem in ("cond_stage_model.model.", "conditioner.embedders.0.model."):
        parts = read_single_file(file_of(old("unet", "sd2", "model.diffusion_model.") | old_text(state, stem)))
        same(parts.tensors["text_encoder"], state)


def test_unknown_keys_keep_their_names():
    extra = {
        key: stub((1,))
        for key in (
            "loose.weight",
            "model.diffusion_model.input_blocks.1.0.odd.weight",
            "first_stage_model.encoder.odd.weight",
            "cond_stage_model.transformer.odd",
        )
    }
    parts = read_single_file(file_of(checkpoint("sd1") | extra))
    known = (
        set(published.state("unet", "sd1"))
        | set(published.state("vae", "vae"))
        | set(published.state("text", "CLIP_L"))
    )
    left = {key for part in parts.tensors.values() for key in part} - known
    assert left == {*extra}


def test_averaged_weights_replace_the_unets():
    stem, tensors = "model.diffusion_model.", checkpoint("sd1")
    names = [key.removeprefix(stem) for key in tensors if key.startswith(stem)]
    averaged = {ema_name(path): dc.replace(tensors[stem + path]) for path in names}
    plain, better = (read_single_file(file_of(tensors | averaged), ema=ema) for ema in (False, True))
    same(better.tensors["unet"], plain.tensors["unet"])
    assert set(map(id, better.tensors["unet"].values())) == set(map(id, averaged.values()))
    assert plain.tensors["unet"]["conv_in.weight"] is tensors[f"{stem}input_blocks.0.0.weight"]
    with pytest.raises(FileError, match="no averaged"):
        read_single_file(file_of(tensors), ema=True)


@pytest.mark.parametrize(("tensors", "error", "message"), [
    (dict, FileError, "nothing at all"),
    (lambda: {"foo.bar": stub((1,))}, FileError, "tensors such as foo.bar"),
    (lambda: {"model.diffusion_model.out.2.weight": stub((4, 320, 3, 3))}, MismatchError, "UNet is not whole"),
    (lambda: {"model.diffusion_model.input_blocks.0.0.weight": stub((320, 4, 3, 3))}, MismatchError, "not whole"),
    (lambda: {"decoder.conv_in.weight": stub((512, 4, 3, 3))}, MismatchError, "autoencoder is not whole"),
    (lambda: {"cond_stage_model.transformer.odd": stub((1,))}, MismatchError, "text encoder is not whole"),
    (lambda: thin(old("unet", "sd1", "")), FileError, "text features of width 24"),
    (lambda: thick(published.state("vae", "vae")), FileError, "16 latent channels"),
])  # fmt: skip
def test_broken_files_are_one_sentence(tensors, error, message):
    with pytest.raises(error, match=message) as caught:
        read_single_file(file_of(tensors()))
    assert str(caught.value).endswith(".")


def thin(tensors: Tensors) -> Tensors:
    return {k: stub((t.shape[0], 24)) if k.endswith("attn2.to_k.weight") else t for k, t in tensors.items()}


def thick(tensors: Tensors) -> Tensors:
    return tensors | {"decoder.conv_in.weight": stub((512, 16, 3, 3))}


@pytest.mark.slow
@pytest.mark.parity
def test_a_whole_file_loads(tmp_path):
    """A tiny SD 1.x and a ControlNet for it in one .ckpt: both load, with the numbers that were stored."""
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    from sfumato.io.fill import slots
    from sfumato.io.load import load, load_controlnet

    from oracle import lazy, seeded

    half = {"block_out_channels": [32, 64], "cross_attention_dim": 768, "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}  # fmt: skip
    up = ["UpBlock2D", "CrossAttnUpBlock2D"]
    made = {
        "unet": seeded(lambda: diffusers.UNet2DConditionModel(**half, up_block_types=up)),
        "controlnet": seeded(lambda: diffusers.ControlNetModel(**half)),
        "vae": seeded(lambda: diffusers.AutoencoderKL(
            block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1)),
        "text_encoder": seeded(lambda: CLIPTextModel(CLIPTextConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=1, vocab_size=300))),
    }  # fmt: skip
    names = {
        "unet": ("model.diffusion_model.", unet_names(half["down_block_types"], up, 2)),
        "controlnet": ("control_model.", controlnet_names(half["down_block_types"], 2)),
        "vae": ("first_stage_model.", vae_names(2, 1)),
    }
    state, expected = {}, {}
    for part, module in made.items():
        prefix, table = names.get(part, ("cond_stage_model.transformer.", {}))
        ours = {k if part != "text_encoder" or k.startswith("text_model.") else f"text_model.{k}": v
                for k, v in module.state_dict().items() if not k.endswith("position_ids")}  # fmt: skip
        expected[part] = lazy(ours)
        state |= {prefix + (rename(key, inverse(table)) or key): value for key, value in ours.items()}
    torch.save({"global_step": 1, "state_dict": state}, tmp_path / "whole.ckpt")

    model, net = load(tmp_path / "whole.ckpt", dtype="float32"), load_controlnet(tmp_path / "whole.ckpt")
    networks = {"unet": model.unet, "vae": model.vae, "controlnet": net, **model.text_encoders}
    for part, tensors in expected.items():
        found = slots(networks[part])
        assert found.keys() == tensors.keys()
        for key, slot in found.items():
            value = np.asarray(flat(networks[part])[slot.path])
            theirs = tensors[key].read()
            theirs = np.moveaxis(theirs, (1, 0), (-2, -1)) if slot.is_kernel else theirs
            np.testing.assert_array_equal(value, theirs, err_msg=key)


def flat(network: Any) -> dict:
    """The parameters of a network by path."""
    return {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))}
