"""The tiny autoencoder against diffusers, and the original files against their formula."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from real_files import real_file
from sfumato.errors import MismatchError, SfumatoError
from sfumato.io.fill import fill, slots
from sfumato.models.config import from_dict, to_dict
from sfumato.models.layers import abstract
from sfumato.models.tiny_vae import AutoencoderTiny, TinyVAEConfig, infer_tiny_config, original_tiny_names

from oracle import assert_close, fill_from_torch, fresh, from_torch, lazy, seeded, to_torch

CONFIGS = {
    "taesd": TinyVAEConfig(encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4),
    "odd": TinyVAEConfig(
        encoder_block_out_channels=(6,) * 3, decoder_block_out_channels=(10,) * 3, num_encoder_blocks=(2, 1, 3),
        num_decoder_blocks=(3, 2, 1), latent_channels=16, act_fn="silu", scaling_factor=0.5, shift_factor=0.2,
    ),
}  # fmt: skip


def shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    return {key: slot.stored for key, slot in slots(module).items()}


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_matches_reference(name):
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Reference

    cfg = CONFIGS[name]
    raw = {key: value for key, value in to_dict(cfg).items() if key != "use_midblock_gn"}
    theirs = seeded(lambda: Reference(**raw))
    vae = fill_from_torch(AutoencoderTiny, cfg, theirs)
    rng = np.random.default_rng(0)
    pixels = rng.uniform(-1, 1, (2, 5 * vae.factor, 3 * vae.factor, 3)).astype(np.float32)
    latents = 3 * rng.standard_normal((2, 5, 3, cfg.latent_channels), dtype=np.float32)
    expected = (from_torch(theirs.encode(to_torch(pixels)).latents) - cfg.shift_factor) * cfg.scaling_factor
    assert_close(jax.jit(lambda vae, x: vae.encode(x))(vae, jnp.array(pixels)), expected)
    unscaled = latents / cfg.scaling_factor + cfg.shift_factor
    z = to_torch(unscaled).requires_grad_()
    expected = theirs.decode(z).sample
    expected.square().sum().backward()

    def loss(x: jax.Array, vae: AutoencoderTiny) -> tuple[jax.Array, jax.Array]:
        decoded = vae.decode(x)
        return (decoded**2).sum(), decoded

    gradient, decoded = jax.jit(jax.grad(loss, has_aux=True))(jnp.array(latents), vae)
    assert_close(decoded, from_torch(expected))
    assert_close(gradient * cfg.scaling_factor, from_torch(z.grad))


@pytest.mark.parity
def test_configuration_defaults_are_the_reference_ones():
    from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny as Reference

    assert from_dict(TinyVAEConfig, dict(Reference().config)) == TinyVAEConfig()


@pytest.mark.parity
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_real_original_files_match_their_formula(half):
    path = real_file(f"taef2_{half}.pth")
    import torch

    raw = {key: value.float() for key, value in torch.load(path, weights_only=True).items()}
    weights = {original_tiny_names(raw)[key]: value for key, value in raw.items()}
    cfg = infer_tiny_config({key: tuple(value.shape) for key, value in weights.items()})
    assert cfg == TinyVAEConfig(latent_channels=32, use_midblock_gn=True)
    own = {key.removeprefix(f"{half}."): value for key, value in weights.items()}
    net = fill(getattr(abstract(AutoencoderTiny, cfg), half), lazy(own))
    rng = np.random.default_rng(0)
    if half == "encoder":
        x = rng.uniform(-1, 1, (2, 48, 64, 3)).astype(np.float32)
        expected = from_torch(original_encoder(raw, to_torch(x) / 2 + 0.5))
    else:
        x = 3 * rng.standard_normal((2, 6, 8, 32), dtype=np.float32)
        expected = from_torch(original_decoder(raw, to_torch(x))) * 2 - 1
    assert_close(jax.jit(lambda net, x: net(x))(net, jnp.array(x)), expected)


def original_encoder(w, x):
    """The encoder of taesd.py with `use_midblock_gn`, layer by layer from the file's own numbers."""
    import torch.nn.functional as F

    x = F.conv2d(x, w["0.weight"], w["0.bias"], padding=1)
    for i in range(1, 14):
        half = i in (2, 6, 10)
        x = F.conv2d(x, w[f"{i}.weight"], stride=2, padding=1) if half else original_block(w, i, x)
    return F.conv2d(x, w["14.weight"], w["14.bias"], padding=1)


def original_decoder(w, x):
    """The decoder of taesd.py with `use_midblock_gn`; layer 0 bends the latents, layer 2 is a ReLU."""
    import torch.nn.functional as F

    x = F.relu(F.conv2d((x / 3).tanh() * 3, w["1.weight"], w["1.bias"], padding=1))
    for i in range(3, 19):
        if i in (6, 11, 16):
            x = F.interpolate(x, scale_factor=2)
        elif i in (7, 12, 17):
            x = F.conv2d(x, w[f"{i}.weight"], padding=1)
        else:
            x = original_block(w, i, x)
    return F.conv2d(x, w["19.weight"], w["19.bias"], padding=1)


def original_block(w, i, x):
    import torch.nn.functional as F

    if f"{i}.pool.0.weight" in w:
        wide = F.conv2d(x, w[f"{i}.pool.0.weight"])
        wide = F.relu(F.group_norm(wide, 4, w[f"{i}.pool.1.weight"], w[f"{i}.pool.1.bias"]))
        x = x + F.conv2d(wide, w[f"{i}.pool.3.weight"])
    h = x
    for j in (0, 2, 4):
        h = F.conv2d(F.relu(h) if j else h, w[f"{i}.conv.{j}.weight"], w[f"{i}.conv.{j}.bias"], padding=1)
    return F.relu(h + x)


def test_original_names_are_numbers_shifted_by_the_layer_that_bends():
    assert original_tiny_names(["0.weight", "3.conv.0.weight"]) == {
        "0.weight": "encoder.layers.0.weight", "3.conv.0.weight": "encoder.layers.3.conv.0.weight",
    }  # fmt: skip
    assert original_tiny_names(["1.weight", "3.conv.0.weight"]) == {
        "1.weight": "decoder.layers.0.weight", "3.conv.0.weight": "decoder.layers.2.conv.0.weight",
    }  # fmt: skip
    with pytest.raises(MismatchError, match=r"unet\.0\.weight"):
        original_tiny_names(["unet.0.weight"])
    with pytest.raises(MismatchError, match="no tensors"):
        original_tiny_names([])


@pytest.mark.parametrize(
    "cfg", [TinyVAEConfig(), TinyVAEConfig(latent_channels=16), TinyVAEConfig(latent_channels=32, use_midblock_gn=True)]
)
def test_configuration_is_inferred_from_shapes_of_both_halves_or_one(cfg):
    found = shapes(abstract(AutoencoderTiny, cfg))
    assert infer_tiny_config(found) == cfg
    for half in ("encoder", "decoder"):
        assert infer_tiny_config({k: v for k, v in found.items() if k.startswith(half)}) == cfg


def test_other_layouts_are_not_taken_for_a_tiny_autoencoder():
    with pytest.raises(MismatchError, match="no layers"):
        infer_tiny_config({"unet.conv_in.weight": (4, 4, 3, 3)})
    stem = {"encoder.layers.0": (32, 3, 3, 3), "encoder.layers.2": (64, 32, 3, 3), "encoder.layers.20": (32, 64, 3, 3)}
    weights = {f"{key}.weight": shape for key, shape in stem.items()}
    with pytest.raises(MismatchError, match="another way"):
        infer_tiny_config(weights | {f"{key}.bias": shape[:1] for key, shape in stem.items()})


def test_bfloat16_is_finite_and_close():
    cfg = CONFIGS["taesd"]
    vae = fresh(AutoencoderTiny, cfg)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), vae)
    latents = jnp.array(np.random.default_rng(0).standard_normal((1, 4, 4, 4), dtype=np.float32))
    both = jax.jit(lambda vae, x: (vae.decode(x), vae.encode(vae.decode(x))))
    for narrow, wide in zip(both(half, latents), both(vae, latents), strict=True):
        assert narrow.dtype == jnp.float32
        assert_close(narrow, wide, tol=5e-2)


def test_stages_that_do_not_fit_are_refused():
    with pytest.raises(SfumatoError, match="num_encoder_blocks has 3 entries, encoder_block_out_channels 4"):
        TinyVAEConfig(num_encoder_blocks=(1, 2, 3))
