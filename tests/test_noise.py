"""Noise depends on the seed alone, is normal, and can be torch's."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.noise import ENCODE, START, checked, per_step, starting, torch_cpu

SHAPE = (8, 6, 4)


def test_a_picture_depends_on_its_own_seed_alone():
    seeds = [7, 0, 7, 123456789, 2**40]
    together = np.asarray(starting(seeds, SHAPE))
    assert together.shape == (5, *SHAPE)
    for picture, seed in zip(together, seeds, strict=True):
        np.testing.assert_array_equal(picture, starting([seed], SHAPE)[0])
    np.testing.assert_array_equal(together[::-1], starting(seeds[::-1], SHAPE))


def test_a_row_depends_on_the_seed_and_its_number_alone():
    few, many = np.asarray(per_step([5, 6], 3, SHAPE)), np.asarray(per_step([6], 7, SHAPE))
    assert few.shape == (3, 2, *SHAPE)
    np.testing.assert_array_equal(few[:, 1], many[:3, 0])


def test_all_that_should_differ_differs():
    draws = [
        *starting([0, 1, 2**32, 2**32 + 1, 2**62], SHAPE), *starting([0], SHAPE, stream=ENCODE),
        *per_step([0, 1], 4, SHAPE).reshape(-1, *SHAPE),
    ]  # fmt: skip
    assert len({np.asarray(draw).tobytes() for draw in draws}) == len(draws)


def test_the_numbers_are_standard_normal_and_independent():
    draws = np.concatenate([starting([0, 1], (64, 64, 4)), per_step([0, 1], 2, (64, 64, 4)).reshape(4, 64, 64, 4)])
    rows = draws.reshape(6, -1)
    count = rows.shape[1]
    assert np.abs(rows.mean(1)).max() < 5 / np.sqrt(count)
    assert np.abs((rows**2).mean(1) - 1).max() < 5 * np.sqrt(2 / count)
    assert np.abs((rows**4).mean(1) - 3).max() < 5 * np.sqrt(96 / count)
    assert np.abs(np.corrcoef(rows) - np.eye(6)).max() < 5 / np.sqrt(count)


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_the_key_is_that_of_jax(seed):
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), START)
    np.testing.assert_array_equal(starting([seed], SHAPE)[0], jax.jit(jax.random.normal, static_argnums=1)(key, SHAPE))


@pytest.mark.slow
def test_settings_of_jax_change_nothing():
    program = "from sfumato.noise import *; print(float(abs(starting([2**40 + 3], (8, 8, 4))).sum()))"
    plain = {"JAX_ENABLE_X64": "0", "JAX_DEFAULT_PRNG_IMPL": "threefry2x32", "XLA_FLAGS": ""}
    other = {
        "JAX_ENABLE_X64": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    outputs = {
        subprocess.run([sys.executable, "-c", program], env=os.environ | env, capture_output=True, check=True).stdout
        for env in (plain, other)
    }
    assert len(outputs) == 1


def test_other_seeds_compile_nothing():
    from sfumato.noise import _draw

    starting([1], SHAPE)
    per_step([1], 3, SHAPE)
    before = _draw._cache_size()
    starting([2, 3, 2**50], SHAPE)
    per_step([4], 3, SHAPE)
    assert _draw._cache_size() == before


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, 1.5, "1", None, True, float("nan")])
def test_what_is_no_seed_is_refused(seed):
    for draw in (starting, torch_cpu):
        with pytest.raises(SfumatoError, match=r"A seed must be a whole number from 0 to 2\^63 - 1, not "):
            draw([0, seed], SHAPE)


def test_integers_of_numpy_are_seeds():
    assert checked(np.arange(3)) == [0, 1, 2]


@pytest.mark.parity
@pytest.mark.parametrize(
    "shape", [(64, 64, 4), (8, 6, 4), (5, 7, 3), (2, 2, 4), (17, 1, 1), (3, 5, 1), (1, 1, 4), (1, 1, 1)]
)
@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 - 1, 2**32 + 5, 2**63 - 1])
def test_the_noise_of_torch_on_cpu(shape, seed):
    import torch

    height, width, channels = shape
    generator = torch.Generator().manual_seed(seed)
    expected = [torch.randn((1, channels, height, width), generator=generator) for _ in range(3)]
    expected = np.stack([draw.permute(0, 2, 3, 1).numpy() for draw in expected])
    got = torch_cpu([seed, 3], shape, draws=3)
    assert got.shape == (3, 2, *shape)
    np.testing.assert_allclose(got[:, :1], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(torch_cpu([3, seed], shape), got[0, ::-1])
