"""Tensors on disk that are described first and read later."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np


@dc.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and type are known and whose numbers are read on demand.

    `read` returns a numpy array of just this shape and type; it may be a view into a memory-mapped file, so whoever
    keeps the numbers copies them.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @classmethod
    def of(cls, array: np.ndarray) -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(array.shape, array.dtype, lambda: array)

    def map(self, shape: tuple[int, ...], change: Callable[[np.ndarray], np.ndarray]) -> LazyTensor:
        """The tensor after `change`, which gives `shape` and keeps the type (a slice, a transposition, a reshape)."""
        return LazyTensor(shape, self.dtype, lambda: change(self.read()))


@dc.dataclass(frozen=True)
class TensorFile:
    """The contents of one file, or of the shards that belong together."""

    path: Path
    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    container: str
    """"safetensors" or "pickle"."""
