"""Tiles and slices: the reference's scheme, and the memory that they are for."""

from __future__ import annotations

import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.models.layers import abstract
from sfumato.models.tiling import _tiled, sliced, tiled_decode, tiled_encode
from sfumato.models.tiny_vae import AutoencoderTiny, TinyVAEConfig
from sfumato.models.vae import AutoencoderKL

from models.test_vae import config, ours, reference
from oracle import assert_close, fresh, from_torch, to_torch

TILE = 8
CONFIG = config((8, 16), norm_num_groups=4, sample_size=2 * TILE)
"""Two pixels a latent; the reference makes its tiles as large as `sample_size`."""

SIZES = {"a cut tile each way": (14, 20), "two cut tiles one way": (19, 5), "one row": (5, 10), "one tile": (8, 7)}


@pytest.mark.parity
@pytest.mark.parametrize("name", SIZES)
def test_tiles_match_reference(name):
    theirs = reference(CONFIG)
    theirs.enable_tiling()
    assert theirs.tile_latent_min_size == TILE
    vae, rng = ours(CONFIG, theirs), np.random.default_rng(0)
    height, width = SIZES[name]
    latents = rng.standard_normal((2, height, width, 4), dtype=np.float32)
    expected = theirs.decode(to_torch(latents / CONFIG.scaling_factor)).sample
    assert_close(jax.jit(partial(tiled_decode, tile=TILE))(vae, jnp.array(latents)), from_torch(expected))

    pixels = rng.uniform(-1, 1, (2, 2 * height, 2 * width, 3)).astype(np.float32)
    noise = rng.standard_normal(latents.shape, dtype=np.float32)
    expected = theirs.encode(to_torch(pixels)).latent_dist
    expected = (from_torch(expected.mean) + from_torch(expected.std) * noise) * CONFIG.scaling_factor
    assert_close(jax.jit(partial(tiled_encode, tile=TILE))(vae, jnp.array(pixels), jnp.array(noise)), expected)


@pytest.mark.parity
def test_slices_match_reference():
    theirs = reference(CONFIG)
    theirs.enable_slicing()
    vae = ours(CONFIG, theirs)
    latents = np.random.default_rng(0).standard_normal((3, 6, 5, 4), dtype=np.float32)
    expected = theirs.decode(to_torch(latents / CONFIG.scaling_factor)).sample
    assert_close(jax.jit(lambda vae, z: sliced(vae.decode, z))(vae, jnp.array(latents)), from_torch(expected))


@pytest.mark.parametrize(("height", "width"), SIZES.values())
@pytest.mark.parametrize("shared", [0, 2, 4])
def test_tiles_of_a_pointwise_function_change_nothing(height, width, shared):
    x = jnp.array(np.random.default_rng(0).standard_normal((1, height, width, 3), dtype=np.float32))
    np.testing.assert_allclose(_tiled(lambda a: 2 * a, x, TILE, shared, lambda n: n), 2 * x, atol=1e-5)


def test_tiles_compose_with_slices_and_with_the_tiny_autoencoder():
    latents = jnp.array(np.random.default_rng(0).standard_normal((2, 10, 5, 4), dtype=np.float32))
    vae, decode = fresh(AutoencoderKL, CONFIG), jax.jit(partial(tiled_decode, tile=TILE))
    both = jax.jit(lambda vae, latents: sliced(partial(tiled_decode, vae, tile=TILE), latents))(vae, latents)
    np.testing.assert_allclose(both, decode(vae, latents), atol=1e-5)
    small = TinyVAEConfig(num_decoder_blocks=(1, 1), decoder_block_out_channels=(8, 8))
    tiny = fresh(AutoencoderTiny, small)
    assert decode(tiny, latents).shape == (2, 20, 10, 3)


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0.3), (8, 0.75), (0, 0.25), (8, -0.25)])
def test_tiles_that_cannot_overlap_so_are_refused(tile, overlap):
    vae = abstract(AutoencoderKL, CONFIG)
    with pytest.raises(SfumatoError, match="cannot overlap"):
        tiled_decode(vae, jnp.zeros((1, 8, 8, 4)), tile=tile, overlap=overlap)


def test_pictures_of_half_latents_are_refused():
    vae = abstract(AutoencoderKL, CONFIG)
    with pytest.raises(SfumatoError, match="multiples of 2"):
        tiled_encode(vae, jnp.zeros((1, 33, 32, 3)), tile=TILE)


@pytest.mark.slow
def test_tiled_decode_of_a_large_picture_needs_little_memory():
    benchmark = runpy.run_path(str(Path(__file__).parents[2] / "benchmarks" / "vae_memory.py"))
    working_memory = benchmark["working_memory"]
    whole, tiled = working_memory(benchmark["decode"], 1024), working_memory(tiled_decode, 1024)
    # 2.5 GiB is what one layer's input and output of 256 and 128 channels take; the rest are copies for Winograd's
    # filtering.
    assert whole <= 3.1 * 2**30
    assert 3 * tiled < whole
    # Any larger picture takes the same tiles: only the decoded tiles themselves are kept.
    assert working_memory(tiled_decode, 2048) < tiled + 4 * 2048**2 * 3 * 4
