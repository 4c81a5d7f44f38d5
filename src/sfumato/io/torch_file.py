"""Files written by `torch.save`, read without torch: the zip form since torch 1.6, and the older stream of pickles.

Nothing in such a file is run (see `safe_pickle`), and its numbers are not read before they are asked for.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.errors import FileError
from sfumato.io.broken import human, plain, text_mode
from sfumato.io.lazy import LazyTensor, MappedFile, TensorFile
from sfumato.io.safe_pickle import Inert, Reader, Refused, SafeUnpickler, Storage, TensorView

MAGIC = 0x1950A86A20F9469CFC6C
"""The first pickle of the older form."""

LONGEST_PICKLE = 1 << 28
"""Bytes of a pickle that are looked at. The numbers of tensors are outside of it, so a few MB are usual."""

WRAPPERS = ("state_dict", "params_ema", "params", "model", "module")
"""Under which of these, the first that holds tensors, training programs keep the weights."""

END, LONGEST_END = b"PK\5\6", 22 + (1 << 16)
"""What begins the last record of a zip archive, and the most bytes of that record with its comment."""

DEEPEST = 32
MOST_METADATA = 1000


def open_zip(path: Path) -> TensorFile:
    """Reads the zip form. Raises FileError with one sentence if it is damaged, unsafe, or another kind of archive."""
    file = MappedFile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:  # the second: an odd zip version
        damage = text_mode(path, file.bytes[: 1 << 22])
        ends = END in bytes(file.bytes[-LONGEST_END:])  # of the archive: what lies before it was altered, not left out
        what = "is damaged" if ends else "is cut off"
        lost = "does not fit it" if ends else "that belongs at its end is not there"
        cut = (f"{path} {what}: it begins as a zip archive, but the table of contents {lost} ({human(len(file))}, "
               f"{error}); download it again.")  # fmt: skip
        raise FileError(damage or cut) from None
    name = next((name for name in entries if re.fullmatch(r"([^/]+/)?data\.pkl", name)), None)
    if name is None:
        raise FileError(f"{path} is {_archive(list(entries))}.")
    top = name.removesuffix("data.pkl")
    if f"{top}constants.pkl" in entries and any(entry.startswith(f"{top}code/") for entry in entries):
        raise FileError(f"{path} is a TorchScript program and not a state dict; get the model's .safetensors version.")

    def locate(entry: str, size: int) -> int:
        if entry not in entries:
            raise FileError(f"{path} is damaged: {plain(entry)} is missing in it.")
        return _stored(path, file, entries[entry], size)

    if f"{top}byteorder" in entries:
        start = locate(f"{top}byteorder", 0)
        if file.bytes[start : start + entries[f"{top}byteorder"].file_size] != b"little":
            raise FileError(f"{path} was saved on a big-endian machine; load it with torch and save it again.")

    def persistent_load(pid: Any) -> Storage:
        key, storage, _ = _storage(pid)
        storage.offset = locate(f"{top}data/{key}", storage.count * storage.dtype.itemsize)
        return storage

    start = locate(name, 0)
    root = _unpickle(path, Reader(file, start, start + _limited(path, entries[name].file_size)), persistent_load)
    return _file(path, file, root)


def _stored(path: Path, file: MappedFile, info: zipfile.ZipInfo, size: int) -> int:
    """Where the bytes of an entry, of which there are to be at least `size`, begin in the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise FileError(f"{path} has been packed anew with compression or a password, which torch never uses; get the "
                        "original file.")  # fmt: skip
    if info.file_size < size:
        raise FileError(f"{path} is damaged: {plain(info.filename)} has {info.file_size} bytes of {size}.")
    here = info.header_offset
    head = file.bytes[here : here + 30] if here >= 0 else b""
    start = here + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    if head[:4] != b"PK\x03\x04" or start + info.file_size > len(file):
        damage = text_mode(path, file.bytes[: 1 << 22])
        raise FileError(damage or f"{path} is damaged: {plain(info.filename)} is not where the archive's table of "
                        "contents has it; download it again.")  # fmt: skip
    return start


def _archive(names: list[str]) -> str:
    """What a zip archive without torch's pickle is."""
    if names and all(name.endswith(".npy") for name in names):
        return "a NumPy archive (.npz); weights come as .safetensors or torch files"
    if "word/document.xml" in names or "[Content_Types].xml" in names:
        return "an office document"
    inside = f"{len(names)} files, the first is {plain(names[0])}" if names else "it is empty"
    return f"a zip archive that torch did not write ({inside}); unpack it first"


def open_pickle(path: Path) -> TensorFile:
    """Reads the form before torch 1.6 (or a bare pickle, which has no tensors). Raises FileError as `open_zip`."""
    file = MappedFile(path)
    reader = Reader(file, 0, min(len(file), LONGEST_PICKLE))
    storages: dict[str, Storage] = {}
    views: list[tuple[Storage, Storage, int]] = []

    def persistent_load(pid: Any) -> Any:
        if isinstance(pid, tuple) and pid[:1] == ("module",) and len(pid) > 1:
            return pid[1]
        key, storage, view = _storage(pid)
        whole = storages.setdefault(key, storage)
        if view is None:
            return whole
        _, offset, count = view
        part = Storage(whole.dtype, int(count))
        views.append((part, whole, int(offset)))
        return part

    root = _unpickle(path, reader, persistent_load)
    if root == MAGIC:
        _unpickle(path, reader, persistent_load)  # the version of the form, which has always been 1001
        system = _unpickle(path, reader, persistent_load)
        if isinstance(system, dict) and system.get("little_endian") is False:
            raise FileError(f"{path} was saved on a big-endian machine; load it with torch and save it again.")
        root = _unpickle(path, reader, persistent_load)
        keys = _unpickle(path, reader, persistent_load)
        _locate(path, file, reader.here, keys, storages)
        for part, whole, offset in views:
            if offset < 0 or offset + part.count > whole.count:
                raise FileError(f"{path} is damaged: a part of a storage reaches beyond it.")
            part.offset = whole.offset + offset * whole.dtype.itemsize
    return _file(path, file, root)


def _locate(path: Path, file: MappedFile, here: int, keys: Any, storages: dict[str, Storage]) -> None:
    """Notes where the storages are, which follow the last pickle in the order of `keys`, each with its length."""
    if not isinstance(keys, list) or set(map(str, keys)) != set(storages):
        raise FileError(f"{path} is damaged: its list of storages is not of the tensors that it describes.")
    for key in map(str, keys):
        storage = storages[key]
        count, size = int.from_bytes(file.bytes[here : here + 8], "little"), storage.count * storage.dtype.itemsize
        if here + 8 + size > len(file):
            raise FileError(f"{path} is cut off: {here + 8 + size} bytes or more are needed and {len(file)} are there; "
                            "download it again.")  # fmt: skip
        if count != storage.count:
            raise FileError(f"{path} is damaged: a storage has {count} numbers where {storage.count} are announced.")
        storage.offset = here + 8
        here += 8 + size


def refuse_unsafe(path: Path) -> None:
    """Raises FileError if a file that looks like text is a pickle that would call something."""
    file = MappedFile(path)
    try:
        SafeUnpickler(Reader(file, 0, min(len(file), LONGEST_PICKLE)), lambda pid: None).load()
    except Refused as refused:
        raise FileError(_refusal(path, refused)) from None
    except Exception:
        return  # it is no pickle


def _limited(path: Path, size: int) -> int:
    if size > LONGEST_PICKLE:
        raise FileError(f"{path} describes its tensors in {human(size)}, which is more than any real file needs.")
    return size


def _refusal(path: Path, refused: Refused) -> str:
    return (f"{path} is refused and nothing in it was run: it would call {plain(str(refused))}, and weights need only "
            "tensors and containers; get the model as .safetensors.")  # fmt: skip


def _unpickle(path: Path, reader: Reader, persistent_load: Callable[[Any], Any]) -> Any:
    try:
        return SafeUnpickler(reader, persistent_load).load()
    except FileError:
        raise
    except Refused as refused:
        raise FileError(_refusal(path, refused)) from None
    except EOFError:
        raise FileError(f"{path} is cut off within the description of its tensors; download it again.") from None
    except (ValueError, OverflowError) as error:
        raise FileError(f"{path} is damaged: {plain(str(error))}.") from None
    except Exception as error:
        # Whatever a pickle of nonsense leads to, it is the file that is wrong.
        raise FileError(f"{path} is damaged: the description of its tensors makes no sense "
                        f"({type(error).__name__}).") from None  # fmt: skip


def _storage(pid: Any) -> tuple[str, Storage, Any]:
    """The key, type and length of the storage that a persistent id speaks of, and which part of it is meant."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage":
        raise ValueError("it refers to something that is no storage")
    _, dtype, key, _, count, *view = pid
    if isinstance(dtype, Inert):
        raise ValueError(f"it holds tensors of the type {dtype.name}, which sfumato does not read")
    if not isinstance(dtype, np.dtype) or type(count) is not int or not 0 <= count < 1 << 56:
        raise ValueError("a storage is of no known type or length")
    return str(key), Storage(dtype, count), view[0] if view else None


def _file(path: Path, file: MappedFile, root: Any) -> TensorFile:
    metadata: dict[str, str] = {}
    views = _flatten(path, root, metadata)
    for name in WRAPPERS:
        inner = root.get(name) if isinstance(root, dict) else None
        if isinstance(inner, dict) and any(isinstance(value, TensorView) for value in inner.values()):
            views = _flatten(path, inner, {})
            break
    if not views:
        what = f"a whole object of the class {plain(root.name)}" if isinstance(root, Inert) else "no tensors"
        raise FileError(f"{path} is a pickle that holds {what}; weights are saved as a state dict, a table of tensors.")
    if any(view.storage.offset < 0 for view in views.values()):
        raise FileError(f"{path} is damaged: it describes tensors, but does not hold their numbers.")
    tensors: dict[str, LazyTensor] = {key: view.lazy(file) for key, view in views.items()}
    return TensorFile(path, tensors, metadata, "pickle")


def _flatten(path: Path, root: Any, metadata: dict[str, str]) -> dict[str, TensorView]:
    """All tensors by their path in nested tables and lists, joined by dots; numbers and strings go to `metadata`."""
    views: dict[str, TensorView] = {}
    seen: set[int] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), root)]
    while waiting:
        names, value = waiting.pop()
        value = value.members if isinstance(value, Inert) else value
        key = ".".join(names)
        if isinstance(value, TensorView):
            if key in views:
                raise FileError(f"{path} holds two tensors that are called {plain(key)}.")
            views[key] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            if len(names) == DEEPEST:
                raise FileError(f"{path} nests its tables more than {DEEPEST} deep.")
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*names, _name(key)), item) for key, item in reversed(list(items))]
        elif isinstance(value, str | int | float) and len(names) <= 2 and len(metadata) < MOST_METADATA:
            metadata[key] = str(value)
    return views


def _name(key: Any) -> str:
    return key.name if isinstance(key, Inert) else str(key)
