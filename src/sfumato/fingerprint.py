"""The name of a program on disk: all that it follows from, in a form that means the same in every process.

Numbers and texts stand for themselves; a function or class for its module and name, if it is found there and the
module belongs to sfumato or to a library whose version is in the name, too. For anything else there is no such form,
and `Unstable` is raised: then the program is not kept.
"""

from __future__ import annotations

import dataclasses as dc
import enum
import functools
import hashlib
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray

from sfumato.version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "ml_dtypes")
"""Of whose code a program is made beside sfumato's own."""

KNOWN = ("sfumato", "builtins", *LIBRARIES)

PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})
"""Types whose values stand for themselves."""


class Unstable(Exception):
    """Something has no name that another process could rely on."""


def fingerprint(*parts: Any) -> str:
    """64 hexadecimal digits of `parts`, of sfumato's code and version, the libraries', jax's settings and the device.

    Raises Unstable, also if sfumato was edited while this process runs: it may go by the old files or by the new ones.
    """
    if _stamps() != LOADED:
        raise Unstable("sfumato's own files")
    everything = _code(), _device(), jax.config.values, *parts
    return hashlib.sha256(repr(described(everything)).encode()).hexdigest()


def _files() -> list[Path]:
    return sorted(Path(__file__).parent.rglob("*.py"))


def _stamps() -> list[tuple[Path, int]]:
    return [(path, path.stat().st_mtime_ns) for path in _files()]


LOADED = _stamps()
"""When each of sfumato's files was last changed as this process began."""


@functools.cache
def _code() -> tuple[str, ...]:
    """Versions, and a digest of sfumato's own files: whoever changes one of them gets no program of the old ones."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(f"{path.relative_to(Path(__file__).parent)}:{path.stat().st_size}:".encode() + path.read_bytes())
    return __version__, digest.hexdigest(), *map(version, LIBRARIES)


def _device() -> tuple[str, str, str]:
    device = jax.local_devices()[0]
    return device.platform, device.device_kind, device.client.platform_version


def described(value: Any) -> Any:
    """`value` in lists of numbers and texts, different for values that jax tells apart. Raises Unstable.

    The first of each list says what it is, so that a text never stands for anything else.
    """
    kind = type(value)
    if kind in PLAIN:
        return value
    if kind in (tuple, list):
        return [kind.__name__, *map(described, value)]
    if isinstance(value, Mapping):
        return ["mapping", named(kind), *map(described, value.keys()), *map(described, value.values())]
    if kind in (set, frozenset):
        return [kind.__name__, *sorted(map(described, value), key=repr)]
    if kind is jax.tree_util.PyTreeDef:
        node = value.node_data()
        return ["leaf"] if node is None else ["tree", *map(described, node), *map(described, value.children())]
    if kind is ShapedArray:
        return ["array", str(value.dtype), *map(described, value.shape), value.weak_type, str(value.sharding.spec)]
    if isinstance(value, np.dtype):
        return ["dtype", str(value)]
    if isinstance(value, enum.Enum):
        return ["enum", named(kind), value.name]
    if dc.is_dataclass(kind):
        fields = [field.name for field in dc.fields(value) if field.compare]
        return ["dataclass", named(kind), *fields, *(described(getattr(value, name)) for name in fields)]
    return named(value)


def named(value: Any) -> list[str]:
    """Where a function or class is found. Raises Unstable if it is not found there, or is code that nobody knows."""
    if value is type(None):  # found under no name
        return ["none"]
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module.partition(".")[0] not in KNOWN:
        raise Unstable(repr(value))
    try:
        found = functools.reduce(getattr, name.split("."), sys.modules[module])
    except (AttributeError, KeyError):
        found = None
    if found is not value:
        raise Unstable(repr(value))
    return ["name", module, name]
