"""Folding the latents' mean and deviation in: what it changes, and what it does not."""

from __future__ import annotations

import dataclasses as dc
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato.errors import SfumatoError
from sfumato.models.layers import abstract
from sfumato.models.vae import AutoencoderKL
from sfumato.train import standardise
from sfumato.train.standardise import standardised

from oracle import assert_close, fresh, from_torch, to_torch


def batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"pixels": rng.uniform(-1, bright, (2, 16, 16, 3)).astype(np.float32)} for bright in (0, 1)]


@jax.jit
def passed(vae: AutoencoderKL, pixels: jax.Array) -> tuple[jax.Array, ...]:
    posterior = vae.posterior(pixels)
    noise = jax.random.normal(jax.random.key(0), posterior.mean.shape)
    latents = vae.encode(pixels, noise)
    return latents, vae.decode(latents), vae.scale(posterior.mean), posterior.logvar


@pytest.fixture(scope="module")
def uneven(loaded):
    """A model whose latents have another mean and deviation in each channel, and all kinds of scales."""
    model = loaded("sd1")
    scales = {"scaling_factor": 0.5, "latents_mean": (0.3, -0.1, 0.2, 0.5), "latents_std": (1.0, 2.0, 0.5, 3.0)}
    vae = fresh(AutoencoderKL, dc.replace(model.vae.config, **scales))
    vae.quant_conv.bias.set_value(jnp.array([2.0, -3.0, 0.5, 1.0, -4.0, -3.0, -5.0, -6.0]))
    vae.quant_conv.kernel.set_value(vae.quant_conv.kernel[...] * jnp.array([1, 5, 0.1, 0.5, 1, 1, 1, 1.0]))
    return dc.replace(model, vae=vae)


@pytest.fixture(scope="module")
def standard(uneven):
    return standardised(uneven, batches())


@pytest.mark.slow
def test_latents_are_standard_and_pictures_the_same(uneven, standard):
    latents, pictures = [], []
    for batch in batches():
        after, before = (passed(model.vae, jnp.asarray(batch["pixels"])) for model in (standard, uneven))
        assert_close(after[1], before[1], tol=1e-5)
        latents.append(after[0].reshape(-1, 4))
        pictures.append(np.stack([after[2].reshape(-1, 4), jnp.exp(after[3]).reshape(-1, 4)]))
    # What training draws, and the same without the chance in it.
    means, variances = np.concatenate(pictures, 1)
    np.testing.assert_allclose(means.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(means.var(0) + variances.mean(0), 1, rtol=1e-4)
    drawn = np.concatenate(latents)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=5 / len(drawn) ** 0.5)
    np.testing.assert_allclose(drawn.std(0), 1, atol=5 / len(drawn) ** 0.5)
    config = standard.vae.config
    assert (config.scaling_factor, config.shift_factor, config.latents_mean, config.latents_std) == (
        1,
        None,
        None,
        None,
    )
    assert standard.vae.decoder.conv_in.kernel[...] is uneven.vae.decoder.conv_in.kernel[...]
    assert uneven.vae.config.scaling_factor == 0.5


@pytest.mark.slow
@pytest.mark.parity
def test_the_reference_makes_the_same_picture_of_the_saved_folder(standard, tmp_path):
    import diffusers

    sfumato.save(standard, tmp_path / "out")
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out" / "vae")
    assert (theirs.config.scaling_factor, theirs.config.shift_factor) == (1, None)
    pixels = batches()[0]["pixels"]
    _, _, mean, logvar = passed(standard.vae, jnp.asarray(pixels))
    posterior = theirs.encode(to_torch(pixels)).latent_dist
    assert_close(mean, from_torch(posterior.mean))
    assert_close(logvar, from_torch(posterior.logvar))
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 4), dtype=np.float32)
    decoded = jax.jit(lambda vae, latents: vae.decode(latents))(standard.vae, jnp.asarray(latents))
    assert_close(decoded, from_torch(theirs.decode(to_torch(latents)).sample))


def test_each_batch_counts_by_its_size(loaded):
    rng = np.random.default_rng(0)
    z = [rng.normal(rows, 1, (rows, 6, 5, 4)) for rows in (1, 3, 2)]

    def measured(vae: AutoencoderKL, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return z.mean((0, 1, 2)), z.var((0, 1, 2))

    with mock.patch.object(standardise, "_measured", measured):
        mean, deviation = standardise.statistics(loaded("sd1").vae, [{"pixels": each} for each in z])
    np.testing.assert_allclose(mean, np.concatenate(z).mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(deviation, np.concatenate(z).std((0, 1, 2)), rtol=1e-5)
    flat = [{"pixels": np.ones((1, 6, 5, 4))}]
    with mock.patch.object(standardise, "_measured", measured), pytest.raises(SfumatoError, match="constant or not"):
        standardise.statistics(loaded("sd1").vae, flat)


def test_bad_input_is_one_sentence(loaded):
    model = loaded("sd1")
    bare = abstract(AutoencoderKL, dc.replace(model.vae.config, use_quant_conv=False))
    with pytest.raises(SfumatoError, match="no quant_conv"):
        standardised(dc.replace(model, vae=bare), batches())
    with pytest.raises(SfumatoError, match="at least one batch"):
        standardised(model, [])
