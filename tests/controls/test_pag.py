"""Perturbed-attention guidance against the torch pipelines, alone and beside others, and the layers it chooses."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato import CFG, PAG, SfumatoError, Window
from sfumato.controls.pag import chosen
from sfumato.models.attention import Attention, identity, unchanged
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet

from models.tiny import SD1, SDXL
from oracle import assert_close, to_torch
from pipelines import nets
from runs import PROMPT, SIZE, mask, noise, picture

NAMES = {"sd1": "StableDiffusion", "sd2": "StableDiffusion", "sdxl": "StableDiffusionXL"}


# ---- The torch pipelines


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layers"), [
    ("sd1", None), ("sd1", ["down_blocks.0", "up_blocks.1.attentions.1"]), ("sd2", None),
    ("sdxl", None), ("sdxl", "up_blocks.0.attentions.1"),
])  # fmt: skip
def test_as_the_reference(kind, layers, pair):
    """The reference rescales the sum of all guidance, and we that of CFG; so neither is rescaled here."""
    applied = {} if layers is None else {"pag_applied_layers": layers}
    both = pair(kind).through(f"{NAMES[kind]}PAGPipeline", **applied)
    got = both.ours(controls=[CFG(5.0), PAG(2.5, layers)])
    both.assert_same(got, both.theirs(pag_scale=2.5))
    assert np.abs(got - both.ours()).max() > 0.05, "PAG did nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_without_classifier_free_guidance(pair):
    both, start = pair("sd1").through("StableDiffusionPAGPipeline"), noise((1, 8, 12, 4))
    got = both.ours(controls=[PAG(2.5)], latents=start, size=(24, 16))
    want = both.theirs(pag_scale=2.5, guidance_scale=0.0, latents=to_torch(start), height=16, width=24)
    both.assert_same(got, want)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_with_a_controlnet(kind, pair):
    ((net, own),) = nets(kind)
    both = pair(kind).through(f"{NAMES[kind]}ControlNetPAGPipeline", controlnet=net)
    got = both.ours(controls=[CFG(5.0), PAG(2.5), sfumato.ControlNet(own, picture(3), 0.8)])
    both.assert_same(got, both.theirs(image=picture(3), controlnet_conditioning_scale=0.8, pag_scale=2.5))


@pytest.mark.parity
@pytest.mark.slow
def test_with_a_controlnet_and_inpainting(pair):
    ((net, own),) = nets("sd1", small=True)
    both = pair("sd1", small=True).through("StableDiffusionControlNetPAGInpaintPipeline", controlnet=net)
    inpaint = sfumato.Inpaint(picture(), mask())
    got = both.ours(controls=[PAG(2.5), inpaint, CFG(5.0), sfumato.ControlNet(own, picture(3), 0.8)])
    want = both.theirs(
        image=picture(), mask_image=mask(), control_image=picture(3), strength=1.0, pag_scale=2.5,
        controlnet_conditioning_scale=0.8, height=16, width=16,
    )  # fmt: skip
    both.assert_same(got, want)


# ---- The identity


def test_every_position_attends_to_itself_alone():
    """Eq. 16: what comes out are the values, and no map of the identity is made for that."""
    attention, x = Attention(8, 2, rngs=nnx.Rngs(0)), jnp.asarray(noise((2, 5, 8)))
    got, maps = attention(x, tap=identity)
    assert_close(got, attention.to_out[0](attention.to_v(x)), 1e-6)
    assert_close(got, attention(x, tap=lambda probabilities: identity(probabilities))[0], 1e-6)
    assert_close(maps, attention(x, tap=unchanged)[1], 1e-6)

    shape = jax.ShapeDtypeStruct((1, 1024, 8), jnp.float32)
    compiled = jax.jit(lambda attention, x: attention(x, tap=identity)[0]).lower(attention, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 1024 * 1024


# ---- Which layers


def model_of(loaded, **config):
    """A model with a UNet of shapes alone."""
    return dc.replace(loaded("sd1"), unet=abstract(UNet, from_dict(UNetConfig, SD1 | config)), name="tiny")


@pytest.mark.parametrize(("config", "parts", "paths"), [
    ({}, None, ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
    ({}, "mid", ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
    ({}, ("up_blocks.1.attentions.2", "down"), [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1",
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.2.transformer_blocks.0.attn1",
    ]),
    ({}, ["mid_block.attentions.0.transformer_blocks.0.attn1"] * 2,
     ["mid_block.attentions.0.transformer_blocks.0.attn1"]),
    ({"transformer_layers_per_block": 11}, "mid_block.attentions.0.transformer_blocks.1",
     ["mid_block.attentions.0.transformer_blocks.1.attn1"]),
    (SDXL, None, [f"mid_block.attentions.0.transformer_blocks.{i}.attn1" for i in range(2)]),
])  # fmt: skip
def test_layers(config, parts, paths, loaded):
    model = model_of(loaded, **config)
    assert chosen(model, parts) == tuple(paths)
    assert chosen(model, chosen(model, parts)) == tuple(paths)


@pytest.mark.parametrize(("config", "parts", "message"), [
    ({}, "attn2", "tiny has no self-attention layer 'attn2' for PAG; 'up_blocks.1', for example, is there."),
    ({}, ["mid", "up_blocks.10"],
     "tiny has no self-attention layer 'up_blocks.10' for PAG; 'up_blocks.1', for example, is there."),
    ({}, "m.d", "tiny has no self-attention layer 'm.d' for PAG; 'up_blocks.1', for example, is there."),
    ({"mid_block_type": None}, None,
     "tiny has no self-attention layer 'mid' for PAG; 'up_blocks.1', for example, is there."),
    ({"mid_block_type": None, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}, None,
     "tiny has no self-attention layer 'mid' for PAG."),
    ({}, [], "PAG's layers are parts of checkpoint paths, such as 'mid', not []."),
    ({}, [""], "PAG's layers are parts of checkpoint paths, such as 'mid', not ['']."),
    ({}, [1], "PAG's layers are parts of checkpoint paths, such as 'mid', not [1]."),
    ({}, 1, "PAG's layers are parts of checkpoint paths, such as 'mid', not 1."),
])  # fmt: skip
@pytest.mark.usefixtures("unchecked")
def test_layers_that_are_not_there(config, parts, message, loaded):
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(model_of(loaded, **config), PROMPT, size=SIZE, controls=[PAG(layers=parts)])
    assert str(raised.value) == message


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [
    ({"scale": float("inf")}, "PAG's scale must be a finite number, not inf."),
    ({"scale": "much"}, "PAG's scale must be a number, not 'much'."),
    ({"window": Window(0, 2)}, "The stop of PAG must lie in [0, 1], not be 2."),
])  # fmt: skip
def test_bad_input(changes, message, loaded):
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(loaded("sd1"), PROMPT, size=SIZE, controls=[PAG(**changes)])
    assert str(raised.value) == message


def test_what_is_perturbed_is_part_of_the_program_and_nothing_else(loaded):
    scale, window = jnp.float32(2.0), Window(jnp.float32(0.1), jnp.float32(0.9))
    prepared = PAG(scale, ("mid",), window)
    assert len(jax.tree.leaves(prepared)) == 3
    assert jax.tree.structure(prepared) == jax.tree.structure(PAG(scale + 1, ("mid",), window))
    assert jax.tree.structure(prepared) != jax.tree.structure(PAG(scale, ("up",), window))
