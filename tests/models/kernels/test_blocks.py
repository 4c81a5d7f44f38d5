"""A layer in blocks of places is the layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.models.attention import FeedForward
from sfumato.models.kernels import in_blocks
from sfumato.models.kernels.table import Table, using


@pytest.mark.parametrize("length", [64, 60])
def test_blocks_are_the_whole(length):
    """Values and gradients; places that no number of blocks holds go through at once."""
    layer = FeedForward(8, rngs=nnx.Rngs(0))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 8)), jnp.float32)
    whole, back = jax.vjp(layer, x)
    with using(Table(rows=16)):
        text = str(jax.make_jaxpr(lambda x: in_blocks(layer, x))(x))
        made, made_back = jax.vjp(lambda x: in_blocks(layer, x), x)
    assert ("platform_index" in text) == (length == 64)
    np.testing.assert_allclose(made, whole, atol=1e-6)
    np.testing.assert_allclose(made_back(whole)[0], back(whole)[0], atol=1e-5)


def test_under_a_mesh_the_rows_stay_with_their_devices():
    mesh = jax.sharding.AbstractMesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jnp.ones((4, 8, 2))
    with using(Table(rows=2)), jax.sharding.use_abstract_mesh(mesh):
        text = str(jax.make_jaxpr(lambda x: in_blocks(jnp.sin, x))(x))
    assert "platform_index" not in text
