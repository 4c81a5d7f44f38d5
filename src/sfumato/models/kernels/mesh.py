"""How the rows of what is computed lie on devices."""

from __future__ import annotations

import jax


def divided() -> bool:
    """Whether the compiler divides rows over several devices by itself. It cannot divide a loop over them: left to it,
    every device would gather the rows of all and go through them all."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and not mesh.manual_axes
