"""Examples: pictures with their texts, from a folder or a data set of Hugging Face `datasets`."""

from __future__ import annotations

import dataclasses as dc
import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Protocol, runtime_checkable

from sfumato.errors import FileError, SfumatoError
from sfumato.io.broken import missing

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Files of a plain folder that are taken for pictures."""
TABLES = (".parquet", ".arrow", ".tar")
"""Files that `datasets` reads."""


@dc.dataclass(frozen=True)
class Example:
    """A picture with its text, or with several of which one is drawn each time."""

    image: Any
    """A path, the bytes of a picture file, or a PIL picture."""
    text: str | tuple[str, ...]
    name: str
    """What to call it in a message."""
    conditioning: Any = None
    """The picture that belongs to it: what a ControlNet is steered by, or what InstructPix2Pix edits."""


@runtime_checkable
class Examples(Protocol):
    """Examples with random access, such as a list of them."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Example: ...


def examples(
    source: Any,
    *,
    text: str | None = None,
    image_column: str = "image",
    text_column: str = "text",
    conditioning_column: str | None = None,
    split: str = "train",
    streaming: bool = False,
    **options: Any,
) -> Any:
    """The examples of `source`, for `Batches`.

    - A folder with metadata.jsonl: a line is {"file_name": ..., "text": ...}, and may have "conditioning_image". Other
      names for the last two are given by `text_column` and `conditioning_column`. A text may be a list of texts.
    - A plain folder, with all that is below it: the text of a.png is in a.txt, or is its name if there is no .txt file.
    - A folder of parquet, arrow or tar files, one of `Dataset.save_to_disk`, or the name of a data set on the hub, read
      by `datasets.load_dataset` with `split`, `streaming` and the other `options`; or a `datasets` object itself.

    `text` is a text for all of them instead of their own. Returns a sequence of `Example`, or a stream. Raises
    FileError for a folder, line or column that is wrong, naming it, and SfumatoError for what cannot be loaded.
    """
    from sfumato.train import rows

    names = rows.Columns(image_column, text_column, conditioning_column, text)
    if rows.is_dataset(source):
        return rows.wrap(source, names, "the data set")
    if not isinstance(source, str | os.PathLike):
        raise SfumatoError(
            f"Examples come from a folder, a data set's name or a datasets object, not a {type(source).__name__}."
        )
    folder = Path(source).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileError(f"{folder} is a file; name the folder that it is in.")
    if not folder.is_dir():
        if not isinstance(source, str) or source.startswith((".", "/", "~")):
            raise FileError(missing(folder))
        return rows.load(source, names, split, streaming, options)
    if (folder / "metadata.jsonl").is_file():
        found = list(_listed(folder, text, text_column, conditioning_column))
    elif rows.saved(folder) or _has_tables(folder):
        return rows.load(folder, names, split, streaming, options)
    else:
        found = _plain(folder, text)
    if streaming or options:
        extra = ", ".join((["streaming"] if streaming else []) + sorted(options))
        raise SfumatoError(f"{folder} is a folder of pictures, which are read one by one, so it takes no {extra}.")
    return found


def _has_tables(folder: Path) -> bool:
    return any(path.suffix.lower() in TABLES for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder in the order of their names, without hidden ones."""
    try:
        for path, folders, files in os.walk(folder, onerror=_raise):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            yield from (Path(path) / name for name in sorted(files) if not name.startswith("."))
    except OSError as error:
        raise FileError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from None


def _raise(error: OSError) -> None:
    raise error


def _listed(folder: Path, text: str | None, text_key: str, conditioning_key: str | None) -> Iterator[Example]:
    """The examples of a folder's metadata.jsonl."""
    path, first = folder / "metadata.jsonl", None
    for number, line in _lines(path):
        where = f"{path} line {number}"
        entry = _entry(line, where)
        image = _inside(folder, entry, "file_name", where)
        value = entry.get(text_key) if text is None else text
        if value is None:
            raise FileError(f"{where} has no {text_key!r}, the text of {image.name}; it has {', '.join(entry)}.")
        key = conditioning_key or "conditioning_image"
        conditioning = _inside(folder, entry, key, where) if entry.get(key) is not None or conditioning_key else None
        first = first or (number, conditioning is not None)
        if (conditioning is not None) != first[1]:
            has, lacks = (first[0], number) if first[1] else (number, first[0])
            raise FileError(f"{path} has a {key!r} in line {has} but none in line {lacks}; all have one or none has.")
        yield Example(image, texts(value, where), str(image), conditioning)
    if first is None:
        raise FileError(f"{path} lists no pictures.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not blank, with their numbers."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    # A byte order mark is no part of the first line.
                    words = line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise FileError(f"{path} line {number} is not UTF-8 text.") from None
                if words.strip():
                    yield number, words
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from None


def _entry(line: str, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{where} is not JSON ({error}).") from None
    if not isinstance(entry, dict):
        raise FileError(f'{where} is no object such as {{"file_name": "a.png", "text": "a cat"}}.')
    return entry


def _inside(folder: Path, entry: dict[str, Any], key: str, where: str) -> Path:
    """The path that an entry names, which may not lead out of the folder."""
    name = entry.get(key)
    if not isinstance(name, str) or not name:
        raise FileError(f"{where} has no {key!r}, a file's name; it has {', '.join(entry) or 'nothing'}.")
    # Links are followed wherever they lead: a downloaded data set consists of them.
    parts = PurePosixPath(name), PureWindowsPath(name)
    if any(".." in path.parts or path.is_absolute() or path.drive or path.root for path in parts) or "\0" in name:
        raise FileError(f"{where} names {name!r}, which is not inside of {folder}.")
    return folder / name


def texts(value: Any, where: str) -> str | tuple[str, ...]:
    """A text or several, as an `Example` has them. Raises FileError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(one, str) for one in value):
        return tuple(value)
    raise FileError(f"{where} has {value!r:.60} for a text, which is neither a text nor a list of texts.")


def _plain(folder: Path, text: str | None) -> list[Example]:
    """The pictures of a folder, with their .txt files or names for texts."""
    files = list(_files(folder))
    pictures = [path for path in files if path.suffix.lower() in ENDINGS]
    for path in files:
        if path.name == "metadata.jsonl":
            raise FileError(f"{folder} has no metadata.jsonl, but {path.parent} has; name that folder.")
        if path.name == "metadata.csv" and text is None:
            raise FileError(f"{path} is not read; write it as metadata.jsonl, a line for each picture.")
    if not pictures:
        kinds = f"none of its {len(files)} files ends in {', '.join(ENDINGS)}" if files else "it is empty"
        raise FileError(f"{folder} has no pictures: {kinds}.")
    if text is not None:
        return [Example(path, text, str(path)) for path in pictures]
    captions = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    captions = {path.with_suffix(""): captions.get(path.with_suffix("")) for path in pictures} if captions else {}
    without = [path for path in pictures if captions and captions[path.with_suffix("")] is None]
    if len(without) == len(pictures):
        captions, without = {}, []
    if without:
        raise FileError(
            f"{len(without)} of {len(pictures)} pictures in {folder} have no text, such as {without[0].name}: "
            f"there is no {without[0].stem}.txt, though other pictures have theirs."
        )
    return [Example(path, _caption(path, captions.get(path.with_suffix(""))), str(path)) for path in pictures]


def _caption(picture: Path, file: Path | None) -> str:
    if file is None:
        return " ".join(picture.stem.replace("_", " ").split())
    try:
        return " ".join(file.read_text("utf-8-sig").split())
    except UnicodeDecodeError:
        raise FileError(f"{file} is not UTF-8 text.") from None
    except OSError as error:
        raise FileError(f"{file} cannot be read: {error.strerror or error}.") from None
