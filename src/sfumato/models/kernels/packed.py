"""Arrays whose numbers are put elsewhere, as whole numbers.

Processors compute bfloat16 in float32, and the CPU compiler widens an array also where it is only copied: joined with
others, filled up, or as a whole where a loop cuts a piece out of it or writes one into it. Whole numbers it leaves
alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def packed(x: Float[Array, "*space"]) -> Shaped[Array, "*space"]:
    """`x` as whole numbers if it is of half precision, as it is otherwise. No gradient goes through them."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def unpacked(x: Shaped[Array, "*space"], dtype: jnp.dtype) -> Shaped[Array, "*space"]:
    """What `packed` made of an array of this type, or makes of it."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def moved(move: Callable[..., Array], *arrays: Array) -> Array:
    """`move(*arrays)`, for arrays of one type and what joins, cuts, fills up with zeros or reorders them; as whole
    numbers, with the gradients it has otherwise."""
    return unpacked(move(*map(packed, arrays)), arrays[0].dtype)


@moved.defjvp
def _moved(move: Callable[..., Array], arrays: Any, tangents: Any) -> tuple[Array, Array]:
    return moved(move, *arrays), move(*tangents)


def joined(*arrays: Float[Array, "*space _"]) -> Float[Array, "*space C"]:
    """The channels of one array beside those of the next, in the type that takes all of them."""
    dtype = jnp.result_type(*arrays)
    return moved(lambda *parts: jnp.concatenate(parts, axis=-1), *(array.astype(dtype) for array in arrays))
