"""Pictures and texts as what the autoencoder and the text encoders say of them, worked out once."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from sfumato.errors import FileError, SfumatoError
from sfumato.image import write_atomically
from sfumato.train.buckets import Size
from sfumato.train.data import Batches
from sfumato.train.examples import Example
from sfumato.train.feed import Indexed, Loader
from sfumato.train.prepare import Prepare
from sfumato.train.rows import name_of

Row = dict[str, Any]
Rows = MutableMapping[int, Row]
"""What is known of an example: by its number, and where annotators take turns, of every turn. Turn t of k of example n
is number n * k + t."""

BROKEN = "broken"
"""Where a row says why there is none."""


@dc.dataclass(frozen=True)
class Stored(Prepare):
    """Rows that have been made before, instead of pictures that are read."""

    rows: Any = None

    def __call__(self, example: Example, size: Size, epoch: int, number: int) -> Row:
        row = self.rows[number * self.turns + self.turn(epoch, number)]
        if BROKEN in row:
            raise FileError(str(row[BROKEN]))
        # Texts that are still read take turns, as without a cache.
        return {**row, "text": self.text(example, epoch, number)} if "text" in row else row


class Files(Rows):
    """Rows in a folder, one a file."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, number: int) -> Path:
        return self.folder / f"{number:08}.npz"

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and self.path(number).is_file()

    def __getitem__(self, number: int) -> Row:
        try:
            with np.load(self.path(number), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError) as error:
            raise SfumatoError(f"{self.path(number)} cannot be read ({error}); delete it and start again.") from None

    def __setitem__(self, number: int, row: Row) -> None:
        write_atomically(self.path(number), lambda file: np.savez(file, **row))

    def __delitem__(self, number: int) -> None:
        self.path(number).unlink()

    def __iter__(self) -> Iterator[int]:
        return (int(path.stem) for path in sorted(self.folder.glob("*.npz")))

    def __len__(self) -> int:
        return len(list(iter(self)))


def with_cache(
    batches: Batches, cache: Callable[[Row], Row], folder: Path | None, count: int, *, quiet: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Batches:  # fmt: skip
    """`batches` of what `cache` makes of them, worked out first, `count` examples at once: in memory, or one file each
    in a `folder`, where nothing is done twice. With a folder, process `shard[0]` of `shard[1]` does its share alone.

    The order is that of the pictures. What is cropped and mirrored stays so, and of several texts of a picture one is
    taken once and for all for each turn of an annotator, unless `cache` leaves them as they are. Raises SfumatoError
    for a stream, and as `Batches` for pictures that cannot be read.
    """
    feed = batches._feed
    if not isinstance(feed, Indexed):
        raise SfumatoError("A stream cannot be cached, for it is not known where it ends; leave out one of the two.")
    rows: Rows = {} if folder is None else Files(folder)
    loader, (index, every) = feed.loader, (0, 1) if folder is None else shard
    prepare = loader.maker.prepare
    wanted = [(size, [place for number in map(int, numbers[index::every]) for place in places(prepare, number)
                      if place not in rows]) for size, numbers in loader.members]  # fmt: skip
    parts = [(size, numbers[at : at + count]) for size, numbers in wanted for at in range(0, len(numbers), count)]
    console = Console(stderr=True)
    hidden = quiet or not console.is_terminal
    with ThreadPoolExecutor(max(feed.threads, 1)) as pool:
        for size, numbers in track(parts, "caching", console=console, transient=True, disable=hidden):
            made = dict(zip(numbers, pool.map(functools.partial(_prepared, loader, size), numbers), strict=True))
            good = [number for number, row in made.items() if BROKEN not in row]
            if good:
                made |= dict(zip(good, _worked_out(cache, [made[number] for number in good], count), strict=True))
            for number, row in made.items():
                rows[number] = row
                if BROKEN in row:
                    batches.skipped[name_of(loader.examples, number // prepare.turns)] = str(row[BROKEN])
    stored = Stored(prepare.seed, annotators=prepare.annotators, rows=rows)
    maker = dc.replace(loader.maker, prepare=stored)
    batches._feed = dc.replace(feed, loader=dc.replace(loader, maker=maker), workers=0)
    return batches


def places(prepare: Prepare, number: int) -> range:
    """The numbers of the rows of an example."""
    return range(number * prepare.turns, (number + 1) * prepare.turns)


def _prepared(loader: Loader, size: Size, place: int) -> Row:
    """The row of a picture. Raises FileError for one that cannot be read, unless such are to be left out."""
    number, turn = divmod(place, loader.maker.prepare.turns)
    # The epoch in which it is that turn, of the first ones.
    epoch = (turn - number) % loader.maker.prepare.turns
    try:
        return loader.maker.prepare(loader.examples[number], size, epoch, number)
    except FileError as error:
        if not loader.maker.skip:
            raise
        return {BROKEN: np.asarray(str(error))}


def _worked_out(cache: Callable[[Row], Row], rows: Sequence[Row], count: int) -> list[Row]:
    """What `cache` makes of the rows. There are always `count` of them at once, so that it is compiled once a size."""
    full = [*rows, *[rows[-1]] * (count - len(rows))]
    batch = {key: [row[key] for row in full] for key in full[0]}
    made = cache({key: values if key == "text" else np.stack(values) for key, values in batch.items()})
    return [{key: value[i] for key, value in made.items()} for i in range(len(rows))]
