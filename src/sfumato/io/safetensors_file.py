"""The safetensors format, described without reading any numbers.

https://github.com/huggingface/safetensors#format: eight bytes with the length of the header, the header in JSON
({name: {dtype, shape, data_offsets}}), then the tensors without gaps. The safetensors library itself either copies
tensors or needs torch for bfloat16, and reports damage in words for programmers; the tests hold this reader to its
verdicts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from sfumato.errors import FileError
from sfumato.io.broken import human, plain, text_mode
from sfumato.io.lazy import MappedFile, TensorFile, room

LONGEST_HEADER = 100_000_000
"""The format's own limit, in bytes."""

MOST_AXES = 32

DTYPES: dict[str, np.dtype] = {name: np.dtype(dtype) for name, dtype in {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz, "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}.items()}  # fmt: skip
"""The format's types that fill whole bytes."""


def open_safetensors(path: Path) -> TensorFile:
    """The file's tensors. Raises FileError with one sentence if it is damaged."""
    file = MappedFile(path)
    header, start = _header(path, file)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise FileError(f"{path} has a damaged header: its metadata is not a table of strings.")
    spans, tensors = [], {}
    for key, entry in header.items():
        shape, dtype, begin, end = _entry(path, key, entry)
        spans.append((begin, end, key))
        tensors[key] = file.tensor(shape, dtype, start + begin)
    _check_layout(path, file, start, sorted(spans))
    return TensorFile(path, tensors, {key: str(value) for key, value in metadata.items()}, "safetensors")


def _header(path: Path, file: MappedFile) -> tuple[dict[str, Any], int]:
    """The header and the position where the data begins."""
    length = int.from_bytes(file.bytes[:8], "little")
    if length > LONGEST_HEADER:
        raise FileError(f"{path} claims a header of {human(length)} in a file of {human(len(file))}; no real header is "
                        f"over {human(LONGEST_HEADER)}, so it is damaged or made to use up memory.")  # fmt: skip
    if 8 + length > len(file):
        raise FileError(f"{path} is cut off within its header: {8 + length} bytes are needed and {len(file)} are "
                        "there; download it again.")  # fmt: skip
    try:
        header = json.loads(file.bytes[8 : 8 + length], object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        damage = text_mode(path, file.bytes[: 1 << 22])
        raise FileError(damage or f"{path} has a damaged header ({error}); download it again.") from None
    if not isinstance(header, dict):
        raise FileError(f"{path} has a damaged header: it is not a table of tensors.")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a name occurs in it twice")
    return table


def _entry(path: Path, key: str, entry: Any) -> tuple[tuple[int, ...], np.dtype, int, int]:
    """A tensor's shape, type, and where it begins and ends in the data."""
    try:
        name, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise FileError(f"{path} has a damaged header: {plain(key)} lacks type, shape or offsets.") from None
    if not isinstance(name, str) or name not in DTYPES:
        raise FileError(f"{path} holds {plain(key)} in the type {name!r}, which sfumato does not know; it reads "
                        f"{', '.join(DTYPES)}.")  # fmt: skip
    numbers = (*shape, begin, end)
    dtype = DTYPES[name]
    natural = all(type(n) is int and n >= 0 for n in numbers) and len(shape) <= MOST_AXES
    if not natural or begin > end or room(shape, dtype) >= 1 << 63:
        raise FileError(f"{path} has a damaged header: {plain(key)} has shape {plain(str(list(shape)))} and bytes "
                        f"{plain(str(begin))} to {plain(str(end))}.")  # fmt: skip
    size = 0 if 0 in shape else room(shape, dtype)
    if size != end - begin:
        raise FileError(f"{path} has a damaged header: {plain(key)} of type {name} and shape {list(shape)} takes "
                        f"{size} bytes, but {end - begin} are set aside for it.")  # fmt: skip
    return shape, dtype, begin, end


def _check_layout(path: Path, file: MappedFile, start: int, spans: list[tuple[int, int, str]]) -> None:
    """The format leaves no gaps between tensors, no overlaps and nothing behind them."""
    here = 0
    for begin, end, key in spans:
        if begin != here:
            what = "overlaps the tensor before it" if begin < here else f"follows a gap of {begin - here} bytes"
            raise FileError(f"{path} has a damaged header: {plain(key)} {what}.")
        here = end
    if start + here == len(file):
        return
    damage = text_mode(path, file.bytes[start : start + (1 << 22)])
    if damage:
        raise FileError(damage)
    if start + here > len(file):
        cut = next(key for _, end, key in spans if start + end > len(file))
        raise FileError(f"{path} is cut off: {start + here} bytes are needed and {len(file)} are there, so "
                        f"{plain(cut)} and what follows it is missing; download it again.")  # fmt: skip
    raise FileError(f"{path} has {len(file) - start - here} bytes behind its last tensor, so it is damaged; "
                    "download it again.")  # fmt: skip
