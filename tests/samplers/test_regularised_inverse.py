"""Regularised DDIM inversion against the torch pipeline's losses, number for number, and what it is for."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.ddim_inverse import DDIMInverse
from sfumato.samplers.regularised_inverse import RegularisedInverse, autocorrelation, divergence
from sfumato.schedule import Schedule

from oracle import from_torch, to_torch
from samplers.oracle import rows


def correlated(*shape: int, seed: int = 2) -> np.ndarray:
    """Noise of mean 0.3 whose neighbours have much in common."""
    white = np.random.default_rng(seed).standard_normal(shape)
    return 0.3 + white + np.roll(white, 1, 1) + np.roll(white, 2, 2)


def one_step(sampler: RegularisedInverse, x: np.ndarray, eps: np.ndarray, steps: int = 10) -> np.ndarray:
    """The latents after the fourth row, in double precision."""
    with jax.enable_x64(True):
        row = list(rows(sampler.table(Schedule(), steps)))[3]
        x, eps = jnp.asarray(x), jnp.asarray(eps)
        after, _ = jax.jit(sampler.step)(x, (x - row.sigma * eps) / row.alpha, eps, row, ())
        return np.asarray(after)


@pytest.mark.parity
@pytest.mark.parametrize("side", [6, 8, 20, 33])
def test_as_the_reference(side, monkeypatch):
    """One picture whose latents are square, of any number of levels; the reference draws our offsets."""
    import torch
    from diffusers import StableDiffusionPix2PixZeroPipeline as Reference

    sampler = RegularisedInverse(iterations=3, rolls=4, autocorrelation=15.0, divergence=7.0, shape=(side, side, 4))
    x, found = correlated(1, side, side, 4, seed=1), correlated(1, side, side, 4)
    offsets, limits = sampler.offsets(10)[3], []
    drawn = iter(offsets.reshape(-1))

    def randint(high, *_, **__):
        limits.append(high)
        return torch.tensor([int(next(drawn))])

    monkeypatch.setattr(torch, "randint", randint)

    eps = to_torch(found)
    for _ in range(3):
        for loss, times, weight in ((Reference.auto_corr_loss, 4, 15.0 / 4), (Reference.kl_divergence, 1, 7.0)):
            for _ in range(times):
                eps = eps.detach().requires_grad_()
                loss(None, eps).backward()
                eps = eps - weight * eps.grad
    assert next(drawn, None) is None, "the reference draws less often"
    levels = offsets.shape[-1]
    assert limits == [side // 2**level // 2 for level in range(levels)] * (offsets.size // levels)

    with jax.enable_x64(True):
        row = list(rows(sampler.table(Schedule(), 10)))[3]
        eps = from_torch(eps)
        want = row.alpha_next * (x - row.sigma * eps) / row.alpha + row.sigma_next * eps
    np.testing.assert_allclose(one_step(sampler, x, found), want, atol=1e-10)


@pytest.mark.parametrize("shape", [(8, 8, 4), (24, 40, 4), (9, 7, 2), (1, 12, 4)])
def test_offsets(shape):
    """Whole numbers below half the smaller side of each level. Each seed has its own, longer runs more of the same."""
    sampler = RegularisedInverse(shape=shape)
    offsets = sampler.offsets(7)
    side, sides = min(shape[:2]), []
    while not sides or sides[-1] > 8:
        sides.append(side // 2 ** len(sides))
    assert offsets.shape == (7, 5, 5, shape[2], len(sides))
    np.testing.assert_array_equal(offsets, np.round(offsets))
    for level, side in enumerate(sides):
        assert set(offsets[..., level].ravel()) == set(range(max(side // 2, 1)))
    np.testing.assert_array_equal(offsets, sampler.offsets(7))
    np.testing.assert_array_equal(offsets[:3], sampler.offsets(3))
    if min(shape[:2]) > 3:
        assert np.any(dc.replace(sampler, seed=1).offsets(7) != offsets)


@pytest.mark.parametrize("shape", [(24, 40, 4), (9, 7, 2), (16, 16, 4)])
def test_pictures_do_not_know_of_each_other(shape):
    sampler, x, eps = RegularisedInverse(shape=shape), correlated(3, *shape, seed=1), correlated(3, *shape)
    eps[1] *= 3
    together = one_step(sampler, x, eps)
    for i in range(3):
        np.testing.assert_allclose(one_step(sampler, x[i : i + 1], eps[i : i + 1]), together[i : i + 1], atol=1e-12)


@pytest.mark.parametrize(
    "changes", [{"iterations": 0}, {"autocorrelation": 0.0, "divergence": 0.0}, {"rolls": 0, "divergence": 0.0}]
)
def test_without_regularisation_it_is_the_plain_inversion(changes):
    shape = (8, 12, 4)
    x, eps = correlated(2, *shape, seed=1), correlated(2, *shape)
    got = one_step(RegularisedInverse(**changes, shape=shape), x, eps)
    np.testing.assert_allclose(got, one_step(DDIMInverse(), x, eps), atol=1e-12)


def test_noise_becomes_whiter():
    shape = (32, 32, 4)
    sampler, before = RegularisedInverse(shape=shape), jnp.asarray(correlated(1, *shape), jnp.float32)
    row = next(rows(dc.replace(sampler, iterations=60).table(Schedule(), 1)))
    # Where nothing is left of the picture the latents are the noise itself.
    row = dc.replace(row, alpha_next=jnp.array(0.0), sigma_next=jnp.array(1.0))
    after, _ = sampler.step(before, before, before, row, ())
    offsets = jnp.asarray(RegularisedInverse(shape=shape, seed=5).offsets(1)[0, 0, 0], jnp.float32)
    for loss in (lambda eps: autocorrelation(eps, offsets), divergence):
        assert float(loss(after)) < 0.5 * float(loss(before))


def test_numbers_are_data():
    """They reach the table only: sampler and program are the same."""
    one, other = RegularisedInverse(), RegularisedInverse(autocorrelation=1.0, divergence=2.0, seed=3)
    assert (one, hash(one)) == (other, hash(other))
    columns = [sampler.table(Schedule(), 4).steps.coefficients for sampler in (one, other)]
    for name in ("offsets", "autocorrelation", "divergence"):
        assert columns[0][name].shape == columns[1][name].shape
        assert np.any(columns[0][name] != columns[1][name])
    assert one != RegularisedInverse(iterations=2)


def test_less_than_nothing():
    with pytest.raises(SfumatoError, match=r"Regularisation takes -1 iterations of 5 rolls; 0 is none\."):
        RegularisedInverse(iterations=-1).table(Schedule(), 4)
