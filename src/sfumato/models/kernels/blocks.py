"""Work on many places, a few at a time."""

from __future__ import annotations

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.mesh import divided
from sfumato.models.kernels.table import in_use


def in_blocks(
    call: Callable[[Float[Array, "*R C"]], Float[Array, "*R D"]], x: Float[Array, "B L C"]
) -> Float[Array, "B L D"]:
    """`call`, which treats every place for itself, on all of them; on a processor block by block if they are many."""
    rows = x.reshape(-1, x.shape[-1])
    few = in_use().rows
    if len(rows) < 4 * few or len(rows) % few or divided():
        return call(x)

    def blocks(x: Array) -> Array:
        return lax.map(call, x.reshape(-1, few, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return lax.platform_dependent(x, cpu=blocks, default=call)
