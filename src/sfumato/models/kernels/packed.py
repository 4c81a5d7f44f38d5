"""Arrays of which a loop reads or writes a piece at a time.

Processors compute bfloat16 in float32, and the CPU compiler widens an array as a whole where a piece is cut out of it
or written into it: each turn of the loop then goes through all of the array. Whole numbers it leaves alone. No gradient
goes through them.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped


def packed(x: Float[Array, "*space"]) -> Shaped[Array, "*space"]:
    """`x` as whole numbers if it is of half precision, as it is otherwise."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def unpacked(x: Shaped[Array, "*space"], dtype: jnp.dtype) -> Float[Array, "*space"]:
    """What `packed` made of an array of this type."""
    return lax.bitcast_convert_type(x, dtype) if x.dtype != dtype else x
