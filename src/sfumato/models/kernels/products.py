"""Products of matrices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` with float32 (or better) accumulation and the result in the type of `lhs`."""
    kwargs["preferred_element_type"] = jnp.promote_types(lhs.dtype, jnp.float32)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **kwargs).astype(lhs.dtype)
