"""Every form of attention is attention."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import pytest

from attentions import BOUNDS, example, same
from sfumato.models import kernels
from sfumato.models.kernels.table import Table, in_use, using

place = importlib.import_module("sfumato.models.kernels.attention")  # the package has a function of this name


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (21, 5), (7, 40), (9, 512)])
def test_blocks_are_the_whole(monkeypatch, dtype, queries, keys):
    """Also where the last block is not full, and with keys to spare."""
    monkeypatch.setattr(place, "BLOCKED_FROM", 0)
    with using(Table(query_block=8)):
        same(kernels.attention, *example(queries, keys, 3, 8, dtype))


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("held", [2**7, 2**10, 2**20])
@pytest.mark.parametrize(("queries", "keys"), [(24, 24), (21, 5)])
def test_blocks_of_all_heads_are_the_whole(monkeypatch, dtype, held, queries, keys):
    """The form of GPUs and TPUs without a fused kernel, with many blocks, few and one."""
    monkeypatch.setattr(place, "HELD", held)
    same(place._by_queries, *example(queries, keys, 3, 8, dtype))


def test_large_maps_are_never_whole():
    """Not even in the compiled program: a map of one head is 4096 x 4096."""
    shape = jax.ShapeDtypeStruct((1, 4096, 2, 8), jnp.float32)
    text = jax.jit(kernels.attention).lower(shape, shape, shape).compile().as_text() or ""
    assert "4096,4096" not in text
    assert f"{in_use().query_block},{4096 + place.SPARE}" in text


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_a_processor_of_a_machine_with_more_has_its_own_form(monkeypatch, backend):
    """Values and gradients, where jax computes on something else by default."""
    monkeypatch.setattr(place, "BLOCKED_FROM", 0)
    monkeypatch.setattr(place, "default_backend", lambda: backend)
    q, k, v = example(24, 520, 3, 8)
    same(jax.jit(kernels.attention), q, k, v)
    one, other = (jax.jit(form).lower(q, k, v).as_text() for form in (kernels.attention, place._by_head))
    assert one.count("stablehlo.while") == other.count("stablehlo.while") > 0
    assert "custom_call" not in one
