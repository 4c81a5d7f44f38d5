"""Pages of memory that stay with the process from step to step.

The C library gives large blocks back to the system when they are freed. A step of a small network on a processor takes
and frees blocks of hundreds of megabytes, and the system clears each page of them anew: a fifth of the step
(benchmarks/NOTES.md, 2026-12-01).
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import jax

IN_THREADS = "jax_cpu_enable_async_dispatch"

TRIM, MAPPED = -1, -4
"""`mallopt`'s names for its settings (glibc's malloc.h): how much free memory the process keeps at most, and how many
blocks it may take from the system one by one."""

KEPT = 2**30
"""Bytes: steps that take more of it last so long that clearing it does not count."""

USUAL = {TRIM: 2**26, MAPPED: 2**16}
"""What these are in a process that has freed a large block before."""


def prepare() -> None:
    """Has processors compute in the thread that calls them, which must be said before the first array is made. Other
    threads have 64 MB that they could keep, and take larger blocks from the system whatever the settings say."""
    jax.config.update(IN_THREADS, val=False)


def prepared() -> bool:
    """Whether that has been said."""
    return not jax.config.read(IN_THREADS)


def keep() -> bool:
    """Has the process keep what it frees, where Linux has its usual C library; returns whether it does. To be called
    once programs are compiled: what compiling leaves behind is given back here."""
    libc = _libc()
    if libc is None:
        return False
    libc.malloc_trim(0)
    return bool(libc.mallopt(MAPPED, 0) and libc.mallopt(TRIM, KEPT))


def give_back() -> None:
    """The end of `keep`."""
    libc = _libc()
    if libc is not None:
        for name, value in USUAL.items():
            libc.mallopt(name, value)
        libc.malloc_trim(0)


def _libc() -> Any:
    """The C library, where it has these settings and is in use."""
    return ctypes.CDLL(None) if prepared() and platform.libc_ver()[0] == "glibc" else None
