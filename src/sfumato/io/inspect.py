"""Telling what a file or folder is, or why it is broken, from names, shapes and settings alone."""

from __future__ import annotations

import dataclasses as dc
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfumato import embedded
from sfumato.errors import FileError
from sfumato.io.broken import human, missing, plain
from sfumato.io.family import Family
from sfumato.io.inspect_folder import read_folder
from sfumato.io.recognise import Finding, recognise
from sfumato.io.recognise_lora import recognise_lora
from sfumato.io.tensors import LazyTensor, TensorFile, open_tensors

BLOCK = 1 << 22
"""Numbers that are checked at once."""


@dc.dataclass(frozen=True)
class Report:
    """What a file or folder is. `str` of it is for people, `to_json` for programs."""

    path: Path
    kind: str
    """"checkpoint", "diffusers folder", "unet", "vae", "text encoder", "controlnet", "tiny autoencoder", "lora",
    "textual inversion", "unknown" or "broken"."""
    family: Family | None = None
    container: str | None = None
    """"safetensors" or "pickle"; both names if a folder has both."""
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    """Size on disk of the files that were looked at."""
    dtypes: Mapping[str, int] = dc.field(default_factory=dict)
    """How many tensors are of which type."""
    details: Mapping[str, str] = dc.field(default_factory=dict)
    problem: str | None = None
    """What is wrong with it, if anything is."""

    def asdict(self) -> dict[str, Any]:
        """The fields as plain types."""
        family = str(self.family) if self.family else None
        return {field.name: getattr(self, field.name) for field in dc.fields(self)} | {
            "path": str(self.path), "family": family, "dtypes": dict(self.dtypes), "details": dict(self.details),
        }  # fmt: skip

    def to_json(self) -> str:
        """The fields as one JSON object."""
        return json.dumps(self.asdict(), indent=2, ensure_ascii=False)

    def __str__(self) -> str:
        title = self.kind + (f", {self.family.full_name}" if self.family else "")
        lines = [str(self.path), f"  {title}"]
        rows = dict(self.details)
        if self.tensors:
            types = ", ".join(self.dtypes)
            rows["tensors"] = f"{self.tensors} with {self.parameters:,} numbers ({types})"
        if self.bytes:
            rows["size"] = human(self.bytes) + (f", {self.container}" if self.container else "")
        if self.problem:
            rows["problem"] = self.problem
        width = max(map(len, rows), default=0)
        return "\n".join(lines + [f"  {name:{width}}  {value}" for name, value in rows.items()])


def inspect(path: str | Path, deep: bool = False) -> Report:
    """What is this? Reads headers and settings only; with `deep` also all numbers, to find broken ones.

    `path` may also name something that comes with sfumato. Raises FileError if there is nothing at it; of a bad file
    the report says what is wrong.
    """
    piece = embedded.find(path)
    path = piece.path if piece else Path(path)
    if not os.path.lexists(path) or (path.is_symlink() and not path.exists()):
        raise FileError(missing(path))
    try:
        if path.is_dir():
            finding, files = read_folder(path)
        else:
            files = [open_tensors(path)]
            finding = recognise(files[0])
        finding = _lora(finding, files[0]) if finding.kind == "lora" else finding
        return _report(path, finding, files, deep)
    except FileError as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or path} cannot be read: {error.strerror or error}."
    return Report(path, "broken", bytes=path.stat().st_size if path.is_file() else 0, problem=problem)


def _lora(finding: Finding, file: TensorFile) -> Finding:
    """What was found in a LoRA, and how it meets the layers of its family."""
    from sfumato.adapters.lora_file import examine  # networks, which nothing else here needs

    lora = recognise_lora(file)
    if lora is None or (finding.problem and finding.family is None):
        return finding
    report = examine(file, lora)
    details = finding.details | report.rows()
    return dc.replace(finding, family=report.family, details=details, problem=finding.problem or report.problem())


def _report(path: Path, finding: Finding, files: list[TensorFile], deep: bool) -> Report:
    tensors = [tensor for file in files for tensor in file.tensors.values()]
    notes = {"note": " ".join(note for file in files for note in file.notes)}
    problem = finding.problem or (_numbers_problem(files) if deep else None)
    return Report(
        path, finding.kind, finding.family,
        " and ".join(sorted({file.container for file in files})) or None,
        len(tensors),
        sum(math.prod(tensor.shape) for tensor in tensors),
        sum(part.stat().st_size for file in files for part in _parts(file)),
        dict(Counter(tensor.dtype.name for tensor in tensors).most_common()),
        finding.details | {name: note for name, note in notes.items() if note},
        problem,
    )  # fmt: skip


def _parts(file: TensorFile) -> Iterable[Path]:
    """The files on disk: one, or those that an index names."""
    if file.path.suffix != ".json":
        return [file.path]
    names = set(json.loads(file.path.read_bytes())["weight_map"].values())
    return [file.path.parent / name for name in names]


def _numbers_problem(files: list[TensorFile]) -> str | None:
    """Tensors with numbers that are not finite, or a file of zeros, in words."""
    bad: list[str] = []
    count, any_number = 0, False
    for file in files:
        for key, tensor in file.tensors.items():
            finite, nonzero = _look(tensor)
            count += 1
            any_number |= nonzero
            bad += [] if finite else [key]
    if bad:
        return f"{len(bad)} of {count} tensors hold NaN or infinite numbers, the first of them {plain(bad[0])}"
    return None if any_number or not count else "every number in it is zero"


def _look(tensor: LazyTensor) -> tuple[bool, bool]:
    """Whether all numbers of a tensor are finite, and whether any is not zero."""
    flat = tensor.read().reshape(-1)
    finite, nonzero = True, False
    for start in range(0, flat.size, BLOCK):
        block = flat[start : start + BLOCK]
        if block.dtype.kind == "V":  # numpy's own functions are slow or absent for bfloat16 and the like
            block = block.astype(np.float32)
        finite &= bool(np.isfinite(block).all())
        nonzero |= bool(block.any())
    tensor.release()
    return finite, nonzero
