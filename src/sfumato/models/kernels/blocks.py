"""Work on many places, a few at a time."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.mesh import divided

ROWS = 512
"""Places at once: what a layer makes of them stays in the cache."""


def in_blocks(
    call: Callable[[Float[Array, "*R C"]], Float[Array, "*R D"]], x: Float[Array, "B L C"]
) -> Float[Array, "B L D"]:
    """`call`, which treats every place for itself, on all of them; on a processor block by block if they are many."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) < 4 * ROWS or len(rows) % ROWS or divided():
        return call(x)

    def blocks(x: Array) -> Array:
        return lax.map(call, x.reshape(-1, ROWS, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, cpu=blocks, default=call)
