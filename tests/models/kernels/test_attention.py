"""Attention in blocks is attention."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.models import kernels
from sfumato.models.kernels.table import Table, in_use, using

place = importlib.import_module("sfumato.models.kernels.attention")  # the package has a function of this name


def example(queries, keys, dtype="float32"):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(rng.standard_normal((2, length, 3, 8)), dtype) for length in (queries, keys, keys))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (21, 5), (7, 40)])
def test_blocks_are_the_whole(monkeypatch, dtype, queries, keys):
    """Values and gradients, also where the last block is not full."""
    q, k, v = example(queries, keys, dtype)
    whole, back = jax.vjp(kernels.attention, q, k, v)
    monkeypatch.setattr(place, "BLOCKED_FROM", 0)
    with using(Table(query_block=8)):
        blocked, blocked_back = jax.vjp(kernels.attention, q, k, v)
    bound = {"float32": 1e-5, "bfloat16": 0.1}[dtype]
    for one, other in zip((whole, *back(whole)), (blocked, *blocked_back(whole)), strict=True):
        assert one.dtype == other.dtype == q.dtype
        assert np.abs(np.asarray(one - other, np.float32)).max() < bound * np.asarray(one, np.float32).std()


def test_large_maps_are_never_whole():
    """Not even in the compiled program: a map of one head is 4096 x 4096."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    text = jax.jit(kernels.attention).lower(shape, shape, shape).compile().as_text() or ""
    assert "4096,4096" not in text
    assert f"{in_use().query_block},4096" in text
