"""What the compiler is told."""

from __future__ import annotations

import functools

import jax

LATE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For processors: order the work so that little is in memory at once. By its own choice the compiler begins with all
that depends on no data, such as every kernel that Winograd's filtering changes; the step takes as long either way."""


@functools.cache
def options() -> dict[str, str] | None:
    """`compiler_options` of `jax.jit` for programs of networks, on the devices that are the default."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=LATE).lower().compile()
    except jax.errors.JaxRuntimeError:  # it is no part of jax's interface, and another version may not have it
        return None
    return LATE
