"""Data sets of Hugging Face `datasets` as examples: with random access (`Rows`) or as a stream (`Stream`)."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfumato.errors import FileError, SfumatoError
from sfumato.train.examples import Example, Examples, texts


@dc.dataclass(frozen=True)
class Columns:
    """Which columns an example is made of; `fixed` is a text for all of them."""

    image: str
    text: str
    conditioning: str | None
    fixed: str | None

    def checked(self, names: Sequence[str], what: str) -> Columns:
        """The columns, with a conditioning picture if there is one of the usual name. Raises FileError for one that is
        not there."""
        here = self
        if self.conditioning is None and "conditioning_image" in names:
            here = dc.replace(self, conditioning="conditioning_image")
        wanted = [here.image, here.conditioning, None if here.fixed is not None else here.text]
        for column in wanted:
            if column is not None and column not in names:
                raise FileError(f"{what[:1].upper()}{what[1:]} has no column {column!r}; it has {', '.join(names)}.")
        return here

    def example(self, row: dict[str, Any], name: str) -> Example:
        """A row as an example. Raises FileError for a cell that is empty or of another kind."""
        text = self.fixed if self.fixed is not None else texts(row[self.text], name)
        other = None if self.conditioning is None else _picture(row[self.conditioning], name, self.conditioning)
        return Example(_picture(row[self.image], name, self.image), text, name, other)


def _picture(cell: Any, name: str, column: str) -> Any:
    """What `sfumato.image.read` takes, out of a cell of a column of pictures."""
    if isinstance(cell, bytes) or hasattr(cell, "getexif"):
        return cell
    if isinstance(cell, dict) and cell.get("bytes"):
        return cell["bytes"]
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        return _fetched(cell["path"], name) if "://" in cell["path"] else Path(cell["path"])
    kind = "is empty" if cell is None or cell == {} else f"holds a {type(cell).__name__} and no picture"
    raise FileError(f"{name}: the column {column!r} {kind}.")


def _fetched(url: str, name: str) -> bytes:
    """The bytes of a picture that a streamed data set only names."""
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return file.read()  # pyright: ignore[reportAttributeAccessIssue]
    except (OSError, ValueError) as error:
        raise FileError(f"{name}: {url} cannot be read ({_first_line(error)}).") from None


class Rows:
    """The examples of a `datasets.Dataset`, made when they are asked for."""

    def __init__(self, dataset: Any, columns: Columns, what: str):
        self.columns = columns.checked(dataset.column_names, what)
        self.dataset, self.what = _undecoded(dataset, self.columns), what

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Example:
        return self.columns.example(self.dataset[int(number)], self.name(number))

    def name(self, number: int) -> str:
        """What a row is called in messages, also if there is no making an example of it."""
        return f"Row {number} of {self.what}"


def name_of(examples: Examples, number: int) -> str:
    """What an example is called in messages."""
    return examples.name(number) if isinstance(examples, Rows) else examples[number].name


class Stream:
    """The rows of a `datasets.IterableDataset`, one after another."""

    def __init__(self, dataset: Any, columns: Columns, what: str):
        if dataset.column_names is not None:
            columns = columns.checked(dataset.column_names, what)
        self.columns, self.dataset, self.what = columns, _undecoded(dataset, columns), what

    def reader(self, epoch: int, row: int, state: dict[str, Any] | None) -> Reader:
        """Reads on from row number `row` of that epoch, where a reader had that `state`."""
        return Reader(self, epoch, row, state)


class Reader:
    """Goes through a stream again and again. Raises SfumatoError if it cannot be read, or has no rows."""

    def __init__(self, stream: Stream, epoch: int, row: int, state: dict[str, Any] | None):
        self.dataset, self.columns, self.what = _copied(stream.dataset), stream.columns, stream.what
        self.epoch, self.row = epoch, row
        self.dataset.set_epoch(epoch)
        if state is not None:
            self.dataset.load_state_dict(state)
        self.rows = iter(self.dataset)

    def state(self) -> dict[str, Any] | None:
        """What the next reader needs to read on from here; JSON."""
        # Before its first row the data set still tells how the epoch before ended.
        return None if self.row == 0 else copy.deepcopy(self.dataset.state_dict())

    def __next__(self) -> tuple[int, int, dict[str, Any]]:
        """The epoch, the number of the row in it, and the row."""
        for _ in range(2):
            try:
                row = next(self.rows)
                self.row += 1
                return self.epoch, self.row - 1, row
            except StopIteration:
                if self.row == 0:
                    break
                self.epoch, self.row = self.epoch + 1, 0
                self.dataset.set_epoch(self.epoch)
                self.rows = iter(self.dataset)
            except OSError as error:
                raise SfumatoError(f"{self.what} cannot be read on ({_first_line(error)}).") from None
        raise SfumatoError(f"{self.what[:1].upper()}{self.what[1:]} has no rows.")

    def example(self, epoch: int, number: int, row: dict[str, Any]) -> Example:
        """A row as an example. Raises FileError for a cell that does not fit."""
        name = f"Row {number} of {self.what}"
        return self.columns.checked(list(row), self.what).example(row, name)


def _copied(dataset: Any) -> Any:
    """The data set as one that was not read yet: it remembers how far it was read, and may have several readers."""
    from huggingface_hub import HfFileSystem

    # It holds the cache of all file systems of the process. A copy made in another thread would enter itself there.
    cache = getattr(HfFileSystem, "_cache", {})
    return copy.deepcopy(dataset, {id(cache): cache})


def is_dataset(source: Any) -> bool:
    """Whether it is an object of `datasets`, told without importing it."""
    return type(source).__module__.split(".")[0] == "datasets"


def saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def load(source: str | Path, columns: Columns, split: str, streaming: bool, options: dict[str, Any]) -> Rows | Stream:
    """A data set from the hub, from disk, or by a builder of `datasets` such as imagefolder."""
    import datasets
    from datasets.exceptions import DatasetsError

    what = f"the data set {source}"
    try:
        if isinstance(source, Path) and saved(source):
            found = datasets.load_from_disk(str(source), **options)
            if isinstance(found, dict):
                found = _of(found, split, what)
            if streaming:
                found = found.to_iterable_dataset()
        else:
            found = datasets.load_dataset(str(source), split=split, streaming=streaming, **options)
    except SfumatoError:
        raise
    # These are what a wrong name, file, split, option or connection ends in.
    except (OSError, ValueError, TypeError, DatasetsError) as error:
        raise SfumatoError(f"{what[:1].upper()}{what[1:]} cannot be loaded ({_first_line(error)}).") from None
    return wrap(found, columns, what)


def wrap(dataset: Any, columns: Columns, what: str) -> Rows | Stream:
    """A `datasets` object as examples. Raises SfumatoError for several splits at once, or an empty one."""
    if isinstance(dataset, dict):
        raise SfumatoError(f"{what[:1].upper()}{what[1:]} has the splits {', '.join(dataset)}; pass one of them.")
    if not hasattr(dataset, "__len__"):
        return Stream(dataset, columns, what)
    if len(dataset) == 0:
        raise SfumatoError(f"{what[:1].upper()}{what[1:]} has no rows.")
    return Rows(dataset, columns, what)


def _of(splits: Any, split: str, what: str) -> Any:
    if split not in splits:
        raise SfumatoError(f"{what[:1].upper()}{what[1:]} has no split {split!r}; it has {', '.join(splits)}.")
    return splits[split]


def _undecoded(dataset: Any, columns: Columns) -> Any:
    """The data set with its pictures as the bytes of their files: `sfumato.image.read` is what reads pictures here."""
    import datasets

    for name in (columns.image, columns.conditioning):
        if name is not None and isinstance((dataset.features or {}).get(name), datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
