"""What a program runs on."""

from __future__ import annotations

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
        "processor": _processor(), "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "devices": [f"{device.platform}: {device.device_kind}" for device in jax.devices()],
        "python": platform.python_version(), "jax": jax.__version__, "sfumato": __version__,
    }  # fmt: skip


def _processor() -> str:
    """Its name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
