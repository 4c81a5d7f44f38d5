"""What a program runs on."""

from __future__ import annotations

import functools
import os
import platform
import sys
from pathlib import Path
from typing import Any

import jax

from sfumato.version import __version__


def machine() -> dict[str, Any]:
    """The processor, the devices, the versions."""
    return {
        "processor": processor(), "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "python": platform.python_version(), "jax": jax.__version__, "sfumato": __version__,
    }  # fmt: skip


def processor() -> str:
    """Its name, as far as the system tells."""
    return _told("model name") or platform.processor() or platform.machine()


@functools.cache
def features() -> frozenset[str]:
    """The instructions the processor has beyond the common ones, by Linux's names for those of x86; empty elsewhere."""
    return frozenset(_told("flags").split())


def _told(name: str) -> str:
    """What Linux says of the first core; empty if it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == name), "")
