"""AutoencoderKL against diffusers, and what must hold without a reference."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.compiler import BARRIERS
from sfumato.errors import SfumatoError
from sfumato.models.config import from_dict, to_dict
from sfumato.models.layers import abstract
from sfumato.models.vae import AutoencoderKL, Gaussian, VAEConfig

from oracle import assert_close, fill_from_torch, fresh, from_torch, seeded, to_torch


def config(channels: tuple[int, ...], **kwargs) -> VAEConfig:
    levels = len(channels)
    return VAEConfig(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, **kwargs,
    )  # fmt: skip


CONFIGS = {
    "stable diffusion": config((8, 16, 16), layers_per_block=2, norm_num_groups=4, sample_size=16),
    "no quant convs, shifted": config(
        (8, 16), layers_per_block=1, norm_num_groups=8, latent_channels=16, use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    ),
    "embedded": config((12, 20, 28, 36), layers_per_block=1, norm_num_groups=4, latent_channels=8, scaling_factor=1.0),
    "without attention": config((8, 16), norm_num_groups=4, mid_block_add_attention=False, act_fn="relu"),
    "latent statistics": config(
        (8, 16), norm_num_groups=4, scaling_factor=0.5, latents_mean=(-1.6, 1.2, 3.0, -2.6),
        latents_std=(8.4, 5.9, 6.5, 5.2),
    ),
}  # fmt: skip


def reference(cfg: VAEConfig):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

    return seeded(lambda: Reference(**to_dict(cfg)))


def ours(cfg: VAEConfig, theirs) -> AutoencoderKL:
    return fill_from_torch(AutoencoderKL, cfg, theirs)


def inputs(cfg: VAEConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two pictures that are not square, and latents of that size."""
    rng, factor = np.random.default_rng(seed), 2 ** (len(cfg.block_out_channels) - 1)
    pixels = rng.uniform(-1, 1, (2, 5 * factor, 3 * factor, 3)).astype(np.float32)
    return pixels, rng.standard_normal((2, 5, 3, cfg.latent_channels), dtype=np.float32)


def centers(cfg: VAEConfig) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation by the formulas of the SDXL pipeline (latents_mean) and the newer ones (shift_factor)."""
    mean = np.float32(cfg.latents_mean if cfg.latents_mean is not None else cfg.shift_factor or 0)
    return mean, np.float32(cfg.latents_std if cfg.latents_std is not None else 1) / cfg.scaling_factor


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_moments_encode_decode_match_reference(name):
    cfg = CONFIGS[name]
    theirs = reference(cfg)
    vae = ours(cfg, theirs)
    pixels, latents = inputs(cfg)
    noise = np.random.default_rng(1).standard_normal(latents.shape, dtype=np.float32)
    posterior = theirs.encode(to_torch(pixels)).latent_dist

    def encode(vae: AutoencoderKL, pixels: jax.Array, noise: jax.Array):
        return vae.posterior(pixels), vae.encode(pixels), vae.encode(pixels, noise)

    found, picked, drawn = jax.jit(encode)(vae, jnp.array(pixels), jnp.array(noise))
    assert_close(found.mean, from_torch(posterior.mean))
    assert_close(found.logvar, from_torch(posterior.logvar))
    mean, std = centers(cfg)
    assert_close(picked, (from_torch(posterior.mean) - mean) / std)
    assert_close(drawn, (from_torch(posterior.mean) + from_torch(posterior.std) * noise - mean) / std)
    pixels = jax.jit(lambda vae, latents: vae.decode(latents))(vae, jnp.array(latents))
    assert_close(pixels, from_torch(theirs.decode(to_torch(latents * std + mean)).sample))


@pytest.mark.parity
def test_odd_sizes_match_reference():
    cfg = CONFIGS["stable diffusion"]
    theirs = reference(cfg)
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 23, 18, 3)).astype(np.float32)
    found = jax.jit(lambda vae, pixels: vae.posterior(pixels))(ours(cfg, theirs), jnp.array(pixels))
    assert_close(found.mean, from_torch(theirs.encode(to_torch(pixels)).latent_dist.mean))


@pytest.mark.parity
@pytest.mark.parametrize("name", ["stable diffusion", "embedded"])
@pytest.mark.parametrize("remat", [False, True])
def test_gradient_of_decode_matches_reference(name, remat):
    cfg = CONFIGS[name]
    theirs = reference(cfg)
    vae = ours(cfg, theirs)
    vae.decoder.remat = remat
    _, latents = inputs(cfg)
    z = to_torch(latents / cfg.scaling_factor).requires_grad_()
    theirs.decode(z).sample.square().sum().backward()
    gradient = jax.jit(jax.grad(lambda x, vae: (vae.decode(x) ** 2).sum()))(jnp.array(latents), vae)
    assert_close(gradient * cfg.scaling_factor, from_torch(z.grad))


def test_decode_inverts_scaling_of_encode():
    cfg = CONFIGS["latent statistics"]
    vae, latents = abstract(AutoencoderKL, cfg), jnp.array(inputs(cfg)[1])
    np.testing.assert_allclose(vae.unscale(vae.scale(latents)), latents, atol=1e-5)


@jax.jit
def everything(vae: AutoencoderKL, pixels: jax.Array, latents: jax.Array) -> tuple[jax.Array, ...]:
    return vae.encode(pixels), vae.posterior(pixels).logvar, vae.decode(latents)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_finite_and_close(dtype):
    cfg = dc.replace(CONFIGS["no quant convs, shifted"], force_upcast=False)
    vae = fresh(AutoencoderKL, cfg)
    half = jax.tree.map(lambda a: a.astype(dtype), vae)
    arrays = [jnp.array(a) for a in inputs(cfg)]
    for narrow, wide in zip(everything(half, *arrays), everything(vae, *arrays), strict=True):
        assert narrow.dtype == jnp.float32
        assert_close(narrow, wide, tol=5e-2)


def test_float16_weights_compute_in_float32_if_upcast_is_forced():
    cfg = CONFIGS["no quant convs, shifted"]
    half = jax.tree.map(lambda a: a.astype(jnp.float16), fresh(AutoencoderKL, cfg))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    arrays = [jnp.array(a) for a in inputs(cfg)]
    for narrow, same in zip(everything(half, *arrays), everything(wide, *arrays), strict=True):
        assert_close(narrow, same, tol=1e-6)


def test_rematerialization_saves_memory_in_training():
    cfg = config((32,), layers_per_block=4, mid_block_add_attention=False)
    # XLA for CPU drops the barriers that keep the second computation from being scheduled beside the first one.

    def working_memory(remat: bool) -> int:
        vae = abstract(AutoencoderKL, cfg)
        vae.decoder.remat = remat
        loss = jax.jit(jax.grad(lambda vae, latents: (vae.decode(latents) ** 2).mean()), compiler_options=BARRIERS)
        latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
        return loss.lower(vae, latents).compile().memory_analysis().temp_size_in_bytes

    assert working_memory(True) < 0.5 * working_memory(False)


def test_gaussian():
    rng = np.random.default_rng(0)
    moments = jnp.array(rng.standard_normal((2, 4, 4, 6)), jnp.bfloat16) * 50
    found = Gaussian.of(moments)
    assert found.mean.dtype == found.logvar.dtype == jnp.float32
    assert (found.logvar.min(), found.logvar.max()) == (-30, 20)
    np.testing.assert_array_equal(found.sample(jnp.zeros_like(found.mean)), found.mean)
    zeros = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_array_equal(Gaussian(zeros, zeros).kl(), [0, 0])
    one = Gaussian(zeros[:1, :1, :1, :1] + 2, zeros[:1, :1, :1, :1] + 1)
    np.testing.assert_allclose(one.kl(), [(4 + np.e - 1 - 1) / 2], rtol=1e-6)


@pytest.mark.parity
def test_configuration_defaults_are_the_reference_ones():
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Reference

    assert from_dict(VAEConfig, dict(Reference().config)) == VAEConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"down_block_types": ("DownEncoderBlock2D",)}, "down_block_types has 1 entries for 2 levels"),
        ({"up_block_types": ("AttnUpDecoderBlock2D",) * 2}, "AttnUpDecoderBlock2D"),
        ({"norm_num_groups": 3}, "does not divide"),
        ({"act_fn": "tanhshrink"}, "act_fn 'tanhshrink'"),
        ({"latents_mean": (0.0,) * 4}, "go together"),
        ({"latents_mean": (0.0,) * 3, "latents_std": (1.0,) * 3}, "latents_mean has 3 entries"),
        ({"scaling_factor": 0.0}, "scaling_factor is 0"),
    ],
)
def test_configurations_that_cannot_work_are_refused(change, message):
    with pytest.raises(SfumatoError, match=message):
        dc.replace(CONFIGS["without attention"], **change)
