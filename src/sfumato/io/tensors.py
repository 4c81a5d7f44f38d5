"""Opening any file of tensors, by what is in it and not by its name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sfumato.errors import FileError
from sfumato.io.broken import plain, sniff, text_stub
from sfumato.io.lazy import LazyTensor, MappedFile, TensorFile
from sfumato.io.safetensors_file import open_safetensors
from sfumato.io.torch_file import open_pickle, open_zip, refuse_unsafe

__all__ = ["LazyTensor", "MappedFile", "TensorFile", "open_tensors"]

READERS = {"safetensors": open_safetensors, "zip": open_zip, "pickle": open_pickle}
LARGEST_INDEX = 100_000_000


def open_tensors(path: str | Path) -> TensorFile:
    """Describes the tensors of a .safetensors or torch file, or of the index of a sharded one.

    Nothing in the file is run and no numbers are read. Raises FileError with one sentence if that cannot be done.
    """
    path = Path(path)
    kind = sniff(path)
    if kind == "json":
        return _open_index(path)
    if kind == "text":
        refuse_unsafe(path)
        raise FileError(text_stub(path))
    try:
        file = READERS[kind](path)
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None
    return TensorFile(path, file.tensors, file.metadata, file.container, (*file.notes, *_notes(path, file.container)))


def _notes(path: Path, container: str) -> list[str]:
    notes = []
    if (path.suffix == ".safetensors") != (container == "safetensors"):
        what = {"safetensors": "a safetensors file", "pickle": "a torch file (pickle)"}[container]
        if path.suffix in {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}:
            notes.append(f"{path.name} is {what} despite its name.")
    part = re.search(r"-(\d{5})-of-(\d{5})\.", path.name)
    if part and int(part[2]) > 1:
        notes.append(f"{path.name} is part {int(part[1])} of {int(part[2])}; the index file opens all of them.")
    return notes


def _open_index(path: Path) -> TensorFile:
    """The shards that an index ({"weight_map": {key: file name}}) lists, as one."""
    weight_map = _weight_map(path)
    names = sorted(set(weight_map.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or ":" in name or name in ("", ".", ".."):
            raise FileError(f"{path} is refused: it names the part {plain(name)!r}, which is not a file beside it.")
    absent = [name for name in names if not (path.parent / name).is_file()]
    if absent:
        raise FileError(f"{path} needs {absent[0]}, which is not beside it ({len(absent)} of {len(names)} parts are "
                        "missing).")  # fmt: skip
    shards = {name: open_tensors(path.parent / name) for name in names}
    tensors: dict[str, LazyTensor] = {}
    for key, name in weight_map.items():
        if key not in shards[name].tensors:
            raise FileError(f"{path} says that {plain(key)} is in {name}, which has no such tensor; these parts and "
                            "this index are of different models.")  # fmt: skip
        tensors[key] = shards[name].tensors[key]
    first = shards[names[0]]
    return TensorFile(path, tensors, first.metadata, first.container)


def _weight_map(path: Path) -> dict[str, str]:
    size = path.stat().st_size
    try:
        index: Any = json.loads(path.read_bytes()) if size <= LARGEST_INDEX else None
    except (ValueError, RecursionError):
        raise FileError(f"{path} holds damaged JSON and not weights ({size} bytes); download it again.") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FileError(f"{path} is a JSON file and not weights; the weights lie in another file, perhaps beside it.")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise FileError(f"{path} is a damaged index: a tensor's file in it is not a name.")
    return weight_map
