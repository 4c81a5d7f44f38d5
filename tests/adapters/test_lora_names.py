"""The names of layers in files, and the published networks that they are looked up in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sfumato.adapters.lora_names import (
    DEFAULT_TARGETS,
    TARGETS,
    bare,
    find,
    is_beyond,
    layers,
    layers_of_family,
    nearest,
    numbered,
    original_names,
    split_name,
)  # fmt: skip
from sfumato.adapters.published import TEXT_ENCODERS, UNETS
from sfumato.io.family import Family
from sfumato.io.original_names import rename
from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict, to_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.unet import UNet

import published
from models.tiny import UNETS as TINY
from pipelines import net_config
from published import CLIP_L, OPEN_CLIP_G, OPEN_CLIP_H

BLOCK = "transformer_blocks.0.attn1"


@pytest.mark.parametrize("family", Family)
def test_published_configurations(family: Family) -> None:
    """They make the networks that were published: the same shapes as the reference's."""
    theirs = to_dict(from_dict(UNetConfig, published.UNETS[str(family)]))
    ours = to_dict(UNETS[family])
    del theirs["sample_size"]
    assert ours == theirs
    encoders = {"sd1": [CLIP_L], "sd2": [OPEN_CLIP_H], "sdxl": [CLIP_L, OPEN_CLIP_G], "sdxl-refiner": [OPEN_CLIP_G]}
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    for ours, theirs in zip(TEXT_ENCODERS[family].values(), encoders[str(family)], strict=True):
        assert isinstance(ours, ClipTextConfig)
        assert all(getattr(ours, name) == theirs[name] for name in fields)


@pytest.mark.parametrize("family", Family)
def test_no_name_means_two_layers(family: Family) -> None:
    """Every path is found by its own name, with dots or underscores, and in a UNet by its original number."""
    components = layers_of_family(family)
    for component, held in components.items():
        original = original_names(UNETS[family]) if component == "unet" else {}
        assert len({path.replace(".", "_") for path in held.shapes}) == len(held.shapes)
        for path in held.shapes:
            for name in (f"{component}.{path}", f"{component}.{rename(path, original) or path}"):
                assert find(name, components) == (component, path)
                assert find(name.replace(".", "_").replace(f"{component}_", f"{component}.", 1), components)
    assert "text_model.embeddings.token_embedding" not in components.get("text_encoder", held).shapes


XL = "lora_unet_"
KNOWN: dict[str, tuple[str, str]] = {
    # numbers of SDXL's original layout, from kohya's and Stability's code
    f"{XL}input_blocks_4_1_transformer_blocks_0_attn1_to_q": ("unet", f"down_blocks.1.attentions.0.{BLOCK}.to_q"),
    f"{XL}input_blocks_8_1_transformer_blocks_9_ff_net_0_proj": (
        "unet", "down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj"),
    f"{XL}input_blocks_3_0_op": ("unet", "down_blocks.0.downsamplers.0.conv"),
    f"{XL}input_blocks_0_0": ("unet", "conv_in"),
    f"{XL}input_blocks_4_0_skip_connection": ("unet", "down_blocks.1.resnets.0.conv_shortcut"),
    f"{XL}middle_block_1_proj_in": ("unet", "mid_block.attentions.0.proj_in"),
    f"{XL}middle_block_2_out_layers_3": ("unet", "mid_block.resnets.1.conv2"),
    f"{XL}output_blocks_5_1_transformer_blocks_1_attn2_to_out_0": (
        "unet", "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_out.0"),
    f"{XL}output_blocks_2_2_conv": ("unet", "up_blocks.0.upsamplers.0.conv"),
    f"{XL}output_blocks_8_0_emb_layers_1": ("unet", "up_blocks.2.resnets.2.time_emb_proj"),
    f"{XL}label_emb_0_2": ("unet", "add_embedding.linear_2"),
    f"{XL}time_embed_0": ("unet", "time_embedding.linear_1"),
    f"{XL}out_2": ("unet", "conv_out"),
    # the other beginnings
    f"{XL}down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (
        "unet", f"down_blocks.1.attentions.0.{BLOCK}.to_q"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
    "lora_te2_text_model_encoder_layers_31_mlp_fc2": ("text_encoder_2", "text_model.encoder.layers.31.mlp.fc2"),
    "lora_te2_text_projection": ("text_encoder_2", "text_projection"),
    "lycoris_mid_block_attentions_0_proj_in": ("unet", "mid_block.attentions.0.proj_in"),
    f"base_model.model.mid_block.attentions.0.{BLOCK}.to_q": ("unet", f"mid_block.attentions.0.{BLOCK}.to_q"),
    f"mid_block.attentions.0.{BLOCK}.processor.to_out": ("unet", f"mid_block.attentions.0.{BLOCK}.to_out.0"),
    f"diffusion_model.middle_block.1.{BLOCK}.to_k": ("unet", f"mid_block.attentions.0.{BLOCK}.to_k"),
    "text_encoder.text_model.encoder.layers.3.self_attn.to_out": (
        "text_encoder", "text_model.encoder.layers.3.self_attn.out_proj"),
    "text_encoder_2.encoder.layers.3.self_attn.k_proj": (
        "text_encoder_2", "text_model.encoder.layers.3.self_attn.k_proj"),
    "base_model.model.text_model.encoder.layers.3.self_attn.k_proj": (
        "text_encoder", "text_model.encoder.layers.3.self_attn.k_proj"),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_known_names(name: str) -> None:
    assert find(name, layers_of_family(Family.SDXL)) == KNOWN[name]


@pytest.mark.parametrize("name", [
    "lora_unet_nothing", "lora_te3_text_projection", "lora_te1_text_projection", "", "unet.",
    "text_encoder.down_blocks.0.resnets.0.conv1", "lora_te1_text_model_embeddings_token_embedding",
])  # fmt: skip
def test_names_of_nothing(name: str) -> None:
    assert find(name, layers_of_family(Family.SDXL)) is None


def test_names_without_their_beginning() -> None:
    assert split_name("lora_unet_mid_block_x") == ("unet", "mid_block_x")
    assert split_name("base_model.model.mid_block.x") == (None, "mid_block_x")
    assert bare("text_encoder_2.text_model.x.y") == "text_model.x.y"


def test_a_controlnet_has_the_names_of_the_encoder() -> None:
    components = {"controlnet": layers(ControlNet, from_dict(ControlNetConfig, net_config("sd1")))}
    for name in ("lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_input_blocks_1_0_in_layers_2",
                 "lora_controlnet_down_blocks_0_resnets_0_conv1", "controlnet.down_blocks.0.resnets.0.conv1",
    ):  # fmt: skip
        assert find(name, components) == ("controlnet", "down_blocks.0.resnets.0.conv1")
        assert not is_beyond(name, components)
    for name in ("lora_unet_up_blocks_0_resnets_0_conv1", "lora_unet_output_blocks_0_0_in_layers_2",
                 "unet.conv_out", "lora_unet_out_2", "lora_te_text_model_encoder_layers_0_mlp_fc1"):  # fmt: skip
        assert find(name, components) is None
        assert is_beyond(name, components)
        assert not is_beyond(name, layers_of_family(Family.SD1))
    assert find("lora_unet_zero_convs_0_0", components) == ("controlnet", "controlnet_down_blocks.0")


@pytest.mark.parametrize(("name", "near"), [
    ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_z",
     f"unet.down_blocks.0.attentions.0.{BLOCK}.to_"),
    ("lora_unet_unet_mid_block_resnets_0_conv1", "unet.mid_block.resnets.0.conv1"),
    ("lora_te_lora_te_text_model_encoder_layers_0_mlp_fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
    ("mid_block.resnet.0.conv1", "unet.mid_block.resnets.0.conv1"),
])  # fmt: skip
def test_the_nearest_name(name: str, near: str) -> None:
    assert str(nearest(name, layers_of_family(Family.SD1))).startswith(near)


def test_nothing_is_near_to_nonsense() -> None:
    assert nearest("qqqqq", layers_of_family(Family.SD1)) is None


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("extended", [True, False])
def test_cloneofsimos_numbers(kind: str, old: bool, extended: bool) -> None:
    """The layers inside of modules of some classes, in the order in which torch enumerates them.

    The diffusers of that time assigned the middle block last, a transformer before the residual block that it
    follows, and the feed-forward before the second attention.
    """
    import diffusers

    unet = diffusers.UNet2DConditionModel(**TINY[kind])
    if old:
        for module in unet.modules():
            for name in ("attentions", "resnets", "downsamplers", "upsamplers", "mid_block", "attn1", "ff", "attn2"):
                if name in module._modules:
                    module._modules[name] = module._modules.pop(name)
    else:
        extended = False  # by then, nobody wrote such files
    classes = {"Attention", "GEGLU", *(["ResnetBlock2D"] if extended else [])}
    theirs = list(dict.fromkeys(inside(unet, classes, extended)))
    held = layers(UNet, from_dict(UNetConfig, TINY[kind]))
    shapes = {i: held.shapes[path][:-3:-1] for i, path in enumerate(theirs)}
    assert list(numbered(shapes, held, sorted(classes)).values()) == theirs


def inside(model: Any, classes: set[str], convolutions: bool) -> Iterator[str]:
    """The paths of dense layers (and convolutions) that are inside of a module of these classes."""
    import torch

    kinds = (torch.nn.Linear, torch.nn.Conv2d) if convolutions else torch.nn.Linear
    for above, ancestor in model.named_modules():
        if type(ancestor).__name__ in classes:
            yield from (f"{above}.{name}" for name, module in ancestor.named_modules() if isinstance(module, kinds))


@pytest.mark.parity
def test_cloneofsimos_numbers_in_text_encoders() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    text = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = [path if path.startswith("text_model") else f"text_model.{path}"
              for path in inside(CLIPTextModel(CLIPTextConfig(**text)), {"CLIPAttention"}, False)]  # fmt: skip
    held = layers(ClipTextEncoder, from_dict(ClipTextConfig, text))
    assert list(numbered({}, held, DEFAULT_TARGETS["text_encoder"]).values()) == theirs
    assert set(DEFAULT_TARGETS["unet"]) <= set(TARGETS)
