"""What the compiler is told."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax

LATE = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
"""For processors: order the work so that little is in memory at once. By its own choice the compiler begins with all
that depends on no data, such as every kernel that Winograd's filtering changes; the step takes as long either way."""

BARRIERS = {"xla_disable_hlo_passes": "cse_barrier_expander"}
"""For processors, and for training in LATE's place: the compiler does not take out the barriers of gradient
checkpointing. Ordered by memory, training takes longer (benchmarks/NOTES.md)."""

OWN_PRODUCTS = {"xla_cpu_experimental_ynn_fusion_type": ""}
"""For processors: products by the compiler's own library and none by YNNPACK, whose programs take longer to be read."""

OWN_BUT_SUMS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
"""The same, but sums by YNNPACK: for training, which has many and reads its program once for thousands of steps."""

LIGHT = 50_000_000
"""Numbers that go into a program up to which `OWN_PRODUCTS` pays (benchmarks/NOTES.md)."""


def is_light(leaves: Iterable[Any]) -> bool:
    """Whether a program of such arguments, weights above all, is one of those of `LIGHT`."""
    return sum(getattr(leaf, "size", 0) for leaf in leaves) < LIGHT


def options(
    light: bool = False, *, told: Mapping[str, str] = LATE, own: Mapping[str, str] = OWN_PRODUCTS,
    platform: str | None = None,
) -> dict[str, str] | None:  # fmt: skip
    """`compiler_options` of `jax.jit` for a program of networks, of arguments of which `is_light` says this, on devices
    of the platform, by default the first. `own` is for light ones alone."""
    platform = platform or jax.default_backend()
    if platform != "cpu":
        return None
    wished = {**told, **(own if light else {})}
    return {name: value for name, value in wished.items() if _known(name, value)} or None


@functools.cache
def _known(name: str, value: str) -> bool:
    """Whether the compiler takes it: these are no part of jax's interface, and another version may not have them."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError:
            return False
    return True
