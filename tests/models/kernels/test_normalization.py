"""Group normalization and its gradients are those of its definition."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.models import kernels
from sfumato.models.kernels import normalization


def plain(x, scale, bias, groups, epsilon):
    """arXiv:1803.08494, eq. 1, word for word."""
    rows = jnp.moveaxis(x, -1, 1).reshape(len(x), groups, -1)
    mean, variance = rows.mean(-1, keepdims=True), rows.var(-1, keepdims=True)
    normal = (rows - mean) / jnp.sqrt(variance + epsilon)
    normal = jnp.moveaxis(normal.reshape(len(x), x.shape[-1], *x.shape[1:-1]), 1, -1)
    return normal * scale + bias


def example(shape):
    rng = np.random.default_rng(0)
    x, gradient = (jnp.asarray(rng.standard_normal(shape) + shift, jnp.float32) for shift in (3, 0.1))
    scale, bias = (jnp.asarray(rng.standard_normal(shape[-1:]), jnp.float32) for _ in range(2))
    return x, scale, bias, gradient


@pytest.mark.parametrize(("shape", "groups"), [((2, 5, 6, 16), 4), ((3, 7, 8), 8), ((1, 4, 4, 6), 1)], ids=str)
def test_values_and_gradients(shape, groups):
    *given, gradient = example(shape)
    out, back = jax.vjp(lambda *three: kernels.group_norm(*three, groups, 1e-5), *given)
    wanted, back_wanted = jax.vjp(lambda *three: plain(*three, groups, 1e-5), *given)
    for found, expected in zip((out, *back(gradient)), (wanted, *back_wanted(gradient)), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("many", "backend"), [(0, "cpu"), (normalization.MANY, "cpu"), (0, "gpu")], ids=["by line", "at once", "gpu"]
)
def test_bfloat16_is_summed_up_in_float32(many, backend, monkeypatch):
    """Far from zero, where sums in bfloat16 would lose everything; each gradient has the type of what it is of."""
    monkeypatch.setattr(normalization, "MANY", many)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x, scale, bias, gradient = example((2, 32, 32, 16))
    x = x.astype(jnp.bfloat16) + jnp.bfloat16(5)
    kinds = x.dtype, scale.dtype, jnp.bfloat16
    out, back = jax.vjp(lambda *three: kernels.group_norm(*three, 4, 1e-5), x, scale, bias.astype(jnp.bfloat16))
    wanted, back_wanted = jax.vjp(lambda *three: plain(*three, 4, 1e-5), x.astype(jnp.float32), scale, bias)
    found = back(gradient.astype(out.dtype))
    assert out.dtype == jnp.bfloat16
    assert tuple(each.dtype for each in found) == kinds
    for one, other in zip((out, *found), (wanted, *back_wanted(gradient)), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other)
        assert np.sqrt(np.square(one - other).mean()) < 1e-2 * np.sqrt(np.square(other).mean())


def test_line_by_line_is_at_once():
    x = example((2, 5, 7, 8))[0].astype(jnp.bfloat16)
    ways = normalization._moments_by_line, normalization._moments
    for one, other in zip(*(way(x, 4) for way in ways), strict=True):
        assert one.shape == other.shape == (2, 1, 8)
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_one_pass_is_two():
    """Also where the mean is ten times the deviation."""
    x = (example((2, 32, 32, 16))[0] + 10).astype(jnp.bfloat16)
    for one, other in zip(normalization._at_once(x, 4), normalization._moments(x, 4), strict=True):
        assert one.shape == other.shape == (2, 1, 16)
        np.testing.assert_allclose(one, other, rtol=2e-4)
    zero = normalization._at_once(jnp.full((1, 3, 3, 4), 0.1, jnp.bfloat16), 2)[1]
    assert (np.asarray(zero) >= 0).all()


def test_a_large_picture_of_half_precision_is_not_widened():
    """What would be its largest array, an autoencoder holds only as long as it takes to read a line."""
    x, weight = jax.ShapeDtypeStruct((1, 256, 256, 32), jnp.bfloat16), jax.ShapeDtypeStruct((32,), jnp.bfloat16)

    def of(x, scale, bias):
        return kernels.group_norm(x + 1, scale, bias, 4, 1e-5)

    used = jax.jit(of).lower(x, weight, weight).compile().memory_analysis().temp_size_in_bytes
    assert used < 1.1 * 2 * x.size * x.dtype.itemsize
