"""Work that is done only sometimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

T = TypeVar("T")


def gate(on: Bool[Array, ""], call: Callable[[], T]) -> T:
    """`call()` while `on`, otherwise zeros of its shape: costs nothing at run time while it is off."""
    structure = []

    @jax.jit  # so that it is traced once, for its shapes and for its branch
    def leaves() -> list[Array]:
        flat, tree = jax.tree.flatten(call())
        structure[:] = [tree]
        return flat

    shapes = jax.eval_shape(leaves)
    flat = jax.lax.cond(on, leaves, lambda: [jnp.zeros(shape.shape, shape.dtype) for shape in shapes])
    return jax.tree.unflatten(structure[0], flat)
