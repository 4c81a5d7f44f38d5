"""Products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from sfumato.models.kernels.table import in_use


def widened(*arrays: Array) -> Sequence[Array]:
    """The arrays; bfloat16 as float32 where the processor multiplies that faster (`Table.bfloat16_wide`)."""
    if not in_use().bfloat16_wide:
        return arrays
    return tuple(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array for array in arrays)


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` with float32 (or better) accumulation and the result in the type of `lhs`."""
    kwargs["preferred_element_type"] = jnp.promote_types(lhs.dtype, jnp.float32)
    some, others = widened(lhs, rhs)
    return lax.dot_general(some, others, dimension_numbers, precision=precision, **kwargs).astype(lhs.dtype)
