"""Products of matrices, and what is added to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.table import in_use


def multiplied_in(dtype: Any) -> jnp.dtype:
    """The type in which numbers of this one are multiplied: float32 for bfloat16 where the processor multiplies that
    faster (`Table.bfloat16_wide`)."""
    wide = jnp.dtype(dtype) == jnp.bfloat16 and in_use().bfloat16_wide
    return jnp.dtype(jnp.float32 if wide else dtype)


def widened(*arrays: Array) -> Sequence[Array]:
    """The arrays, each in the type in which it is multiplied."""
    return tuple(array.astype(multiplied_in(array.dtype)) for array in arrays)


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` with float32 (or better) accumulation and the result in the type of `lhs`."""
    # Devices with units for products sum up in float32 in any case. Asked for a result of that type, a GPU writes it to
    # memory, and rounds it when it is read again.
    on_processor = jax.default_backend() == "cpu"
    kwargs["preferred_element_type"] = jnp.promote_types(lhs.dtype, jnp.float32) if on_processor else lhs.dtype
    some, others = widened(lhs, rhs)
    return lax.dot_general(some, others, dimension_numbers, precision=precision, **kwargs).astype(lhs.dtype)


@jax.custom_jvp
def plus(x: Float[Array, "*space"], y: Float[Array, "*part"]) -> Float[Array, "*space"]:
    """`x` and what is added to it, such as a bias, which may be the same at many places: the gradient, a sum over them,
    is made in float32 or better. In half precision a processor's sums of ones do not get beyond a thousand."""
    return x + y.astype(x.dtype)


@plus.defjvp
def _plus(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    x, (dx, dy) = primals[0], tangents
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return plus(*primals), (dx.astype(wide) + dy.astype(wide)).astype(x.dtype)
