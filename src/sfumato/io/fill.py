"""Fills a network with the numbers of a checkpoint: shapes first, then the data, straight into the wanted type.

The network is built abstractly, so nothing is allocated before every key and shape is known to fit. Then a few
threads read tensor by tensor from the memory-mapped file, convert and transpose it in blocks that stay in the cache,
and hand the finished buffer to jax without another copy.
"""

from __future__ import annotations

import dataclasses as dc
import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from sfumato.errors import FileError, MismatchError
from sfumato.io.tensors import LazyTensor

M = TypeVar("M", bound=nnx.Module)

LEAF_NAMES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""Names of parameters in Flax that differ from the checkpoint's; all others are the same in both."""

DTYPES = {"float32": np.dtype("float32"), "float16": np.dtype("float16"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
"""The types that weights may be loaded in or saved as, by name."""

BLOCK = 1 << 18
"""Numbers converted at once by a thread."""


@dc.dataclass(frozen=True)
class Slot:
    """Where one parameter of a network lies in a checkpoint."""

    key: str
    """The checkpoint's key."""
    path: tuple[Any, ...]
    """The parameter's path in the network."""
    shape: tuple[int, ...]
    """Its shape in the network; a convolution's kernel is HWIO, a dense one's is [inputs, outputs]."""

    @property
    def is_kernel(self) -> bool:
        return self.path[-1] == "kernel"

    @property
    def stored(self) -> tuple[int, ...]:
        """Its shape in the checkpoint, where outputs come first: OIHW, or [outputs, inputs]."""
        return (self.shape[-1], self.shape[-2], *self.shape[:-2]) if self.is_kernel else self.shape


def slots(module: nnx.Module) -> dict[str, Slot]:
    """All parameters of a network (which may be abstract) by checkpoint key."""
    found = {}
    for path, parameter in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *parents, leaf = path
        key = ".".join(map(str, [*parents, LEAF_NAMES.get(str(leaf), leaf)]))
        found[key] = Slot(key, path, tuple(parameter.shape))
    return found


def dtype_of(name: str) -> np.dtype:
    """The numpy type of a name such as "bfloat16"; raises MismatchError for a type that weights cannot have."""
    if str(name) not in DTYPES:
        raise MismatchError(f"Weights can be {', '.join(DTYPES)}, not {name!r}.")
    return DTYPES[str(name)]


def fill(
    module: M, tensors: Mapping[str, LazyTensor], *, dtype: str = "float32", what: str = "the network",
    ignore: Callable[[str], bool] = lambda key: False,
) -> M:  # fmt: skip
    """A network like `module`, of which only the shapes are looked at, with its parameters taken from `tensors`.

    `dtype` is the type of the result; `ignore` tells which keys may be there without being used; `what` names the
    network in messages. Raises MismatchError that lists all missing, unexpected and misshapen keys at once, or
    FileError that names a tensor with NaN or infinite numbers.
    """
    wanted_dtype = dtype_of(dtype)
    wanted = slots(module)
    given = {key: tensor for key, tensor in tensors.items() if key in wanted or not ignore(key)}
    problem = compare(wanted, given)
    if problem:
        raise MismatchError(f"The weights do not fit {what}: {problem}.")
    # The largest first, so that no thread is left alone with a large one at the end.
    order = sorted(wanted.values(), key=lambda slot: -int(np.prod(slot.shape)))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        arrays = dict(pool.map(lambda slot: (slot.path, load(slot, given[slot.key], wanted_dtype)), order))
    graph, state = nnx.split(module)
    flat = [(path, leaf.replace(arrays[path])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def compare(wanted: Mapping[str, Slot], given: Mapping[str, LazyTensor]) -> str:
    """What does not fit, in words; empty if all does."""
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted]
    misshapen = [
        f"{key} is {_shape(given[key].shape)} and should be {_shape(slot.stored)}"
        for key, slot in wanted.items()
        if key in given and given[key].shape != slot.stored
    ]
    wrong = [
        f"{key} holds {given[key].dtype}"
        for key in wanted
        if key in given and not np.issubdtype(given[key].dtype, np.floating) and given[key].dtype.kind != "V"
    ]
    parts = []
    if missing:
        hint = difflib.get_close_matches(missing[0], unexpected, n=2, cutoff=0.6)
        near = f" (nearest in the file: {', '.join(hint)})" if hint else ""
        parts.append(f"{len(missing)} missing: {_some(missing)}{near}")
    if unexpected:
        hint = difflib.get_close_matches(unexpected[0], missing or wanted, n=2, cutoff=0.6)
        near = f" (nearest in the network: {', '.join(hint)})" if hint else ""
        parts.append(f"{len(unexpected)} unexpected: {_some(unexpected)}{near}")
    if misshapen:
        parts.append(f"{len(misshapen)} misshapen: {_some(misshapen)}")
    if wrong:
        parts.append(f"{len(wrong)} not of a floating-point type: {_some(wrong)}")
    return "; ".join(parts)


def load(slot: Slot, tensor: LazyTensor, dtype: np.dtype) -> jax.Array:
    """One parameter, converted and transposed block by block over its outputs."""
    source = tensor.read()
    target = _aligned(slot.shape, dtype)
    if slot.is_kernel:
        # [O, I, *space] -> [*space, I, O], as rows of outputs: each block fills some columns of the target.
        columns = target.reshape(-1, slot.shape[-2], slot.shape[-1])
        step = max(1, BLOCK // max(1, source[0].size))
        for start in range(0, len(source), step):
            block = _convert(source[start : start + step], dtype, slot.key)
            rows = _transposed(block.reshape(len(block), -1)).reshape(slot.shape[-2], -1, len(block))
            columns[:, :, start : start + step] = rows.transpose(1, 0, 2)
    else:
        flat, given = target.reshape(-1), source.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            flat[start : start + BLOCK] = _convert(given[start : start + BLOCK], dtype, slot.key)
    tensor.release()
    return jax.device_put(target)


def _convert(block: np.ndarray, dtype: np.dtype, key: str) -> np.ndarray:
    block = np.ascontiguousarray(block)
    with np.errstate(over="ignore", invalid="ignore"):
        if block.dtype == np.float16 and dtype != np.float16:
            block = _widened(block)
        block = block.astype(dtype, copy=False)
    if not _finite(block):
        raise FileError(f"The tensor {key} holds numbers that are not finite in {dtype.name}; the file is damaged "
                        "or needs a wider type.")  # fmt: skip
    return block


def _finite(block: np.ndarray) -> bool:
    """Whether all numbers are finite; on the bits for bfloat16, whose own test is slow in numpy."""
    if block.dtype == DTYPES["bfloat16"]:
        return bool(((block.view(np.uint16) & 0x7F80) != 0x7F80).all())
    return bool(np.isfinite(block).all())


def _widened(block: np.ndarray) -> np.ndarray:
    """float16 as float32; OpenCV does it several times as fast as numpy."""
    import cv2

    return cv2.add(block.reshape(1, -1), np.zeros(1), dtype=cv2.CV_32F).reshape(block.shape)


def _transposed(block: np.ndarray) -> np.ndarray:
    """The transpose of a matrix of 2- or 4-byte numbers; OpenCV does it by tiles, several times as fast as numpy."""
    import cv2

    carrier = {2: np.uint16, 4: np.int32}[block.itemsize]
    return cv2.transpose(block.view(carrier)).reshape(block.shape[::-1]).view(block.dtype)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that starts at a multiple of 64 bytes, which jax on CPU takes over without a copy."""
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _some(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _shape(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
