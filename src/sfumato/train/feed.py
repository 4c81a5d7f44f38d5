"""Where the batches come from: examples with random access, made by grain (`Indexed`), or a stream (`Windowed`)."""

from __future__ import annotations

import collections
import dataclasses as dc
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sfumato.errors import FileError, SfumatoError
from sfumato.train.buckets import Size, nearest
from sfumato.train.examples import Example, Examples
from sfumato.train.order import Order
from sfumato.train.prepare import Prepare, upright_size
from sfumato.train.rows import Reader, Stream, name_of

TRIES = 100
"""After so many unreadable pictures in a row something else is wrong, such as a disk that is gone."""
AHEAD = 4
"""Batches of a stream that are made before they are asked for."""

Made = dict[str, Any]
Place = dict[str, Any]
Try = tuple[int, int, str, Callable[[], Example]]
"""An epoch, the number and the name of an example, and what makes it."""
Waiting = tuple[int, int, Example]
"""The same of an example that was read."""
Rated = tuple[float, Waiting]
"""With its ratio width / height."""


@dc.dataclass(frozen=True)
class Maker:
    """How rows are made, and which rows of a batch are this process's."""

    prepare: Prepare
    batch: int
    shard: tuple[int, int]
    skip: bool

    @property
    def group(self) -> int:
        """The rows of a batch in all processes."""
        return self.batch * self.shard[1]

    @property
    def mine(self) -> range:
        """Which of them are this process's."""
        return range(self.shard[0] * self.batch, (self.shard[0] + 1) * self.batch)

    def row(self, tries: Iterable[Try], size: Size) -> tuple[Made, dict[str, str]]:
        """A row of the first example that can be read, and what was the matter with those before it."""
        skipped: dict[str, str] = {}
        for epoch, number, name, make in tries:
            try:
                return self.prepare(make(), size, epoch, number), skipped
            except FileError as error:
                if not self.skip:
                    raise
                skipped[name] = str(error)
            if len(skipped) >= TRIES:
                break
        last = next(reversed(skipped.values()))
        raise FileError(f"{len(skipped)} examples one after another cannot be read; the last: {last}")

    def stacked(self, rows: Sequence[tuple[Made, dict[str, str]]]) -> Made:
        """The rows as one batch."""
        keys = set(rows[0][0])
        if any(set(row) != keys for row, _ in rows):
            raise SfumatoError("Some examples have a conditioning picture and some none; all or none must have one.")
        batch = {key: [row[key] for row, _ in rows] for key in sorted(keys)}
        batch = {key: values if key == "text" else np.stack(values) for key, values in batch.items()}
        return batch | {"skipped": {name: why for _, skipped in rows for name, why in skipped.items()}}


@dc.dataclass(frozen=True)
class Loader:
    """Makes batch number so-and-so, in whichever thread or process."""

    examples: Examples
    members: tuple[tuple[Size, Any], ...]
    """The sizes, and the numbers of the examples that are trained at each."""
    order: Order
    maker: Maker

    def __call__(self, number: int) -> Made:
        bucket, rows = self.order(int(number))
        size, members = self.members[bucket]
        try:
            return self.maker.stacked([self.maker.row(self._tries(members, *rows[i]), size) for i in self.maker.mine])
        # From another process an exception arrives with its traceback for a message.
        except SfumatoError as error:
            return {"error": str(error), "kind": type(error).__name__}

    def _tries(self, members: Any, epoch: int, place: int) -> Iterator[Try]:
        """The example, and those that may take its place, of the same bucket."""
        for offset in range(len(members)):
            number = int(members[(place + offset) % len(members)])
            yield epoch, number, name_of(self.examples, number), lambda number=number: self.examples[number]


@dc.dataclass(frozen=True)
class Indexed:
    """Batches by their numbers, made in threads or, with `workers`, in processes of grain."""

    loader: Loader
    threads: int
    workers: int
    start = {"batch": 0}  # noqa: RUF012

    def run(self, place: Place) -> Iterator[tuple[Made, Place]]:
        """The batches from a place on, each with the place after it. The place is a number, whoever makes them."""
        import grain

        # A batch is big, and grain would keep 500 of them.
        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=max(self.threads, 2))
        batches = grain.MapDataset.range(place["batch"], sys.maxsize).map(self.loader).to_iter_dataset(ahead)
        if self.workers:
            _parse_flags()
            options = grain.MultiprocessingOptions(num_workers=self.workers, per_worker_buffer_size=1)
            batches = batches.mp_prefetch(options, _deaf)
        iterator = iter(batches)
        try:
            for number, batch in enumerate(iterator, place["batch"] + 1):
                if "error" in batch:
                    raise (FileError if batch["kind"] == "FileError" else SfumatoError)(batch["error"])
                if self.workers:
                    # The arrays are in shared memory, which is to be given back.
                    batch |= {key: np.array(batch[key]) for key in batch if key not in ("text", "skipped")}
                yield batch, {"batch": number}
        finally:
            iterator.close()


def _deaf(worker: int, workers: int) -> None:
    """Ctrl-C in a terminal reaches every process, and it is the training that ends the others, after its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _parse_flags() -> None:
    """grain's processes read flags of absl, which somebody must have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@dc.dataclass(frozen=True)
class Windowed:
    """Batches of a stream, which is read window by window; a window is shuffled and sorted into buckets.

    A window has a multiple of the rows of a batch, and what is left over of its buckets is put together by proportions,
    so every example is seen once an epoch. All processes read the whole stream, for a batch must be of one size in all
    of them; each decodes only its rows.
    """

    stream: Stream
    maker: Maker
    sizes: tuple[Size, ...]
    seed: int
    window: int
    threads: int
    start = {"epoch": 0, "row": 0, "state": None, "batch": 0}  # noqa: RUF012

    def run(self, place: Place) -> Iterator[tuple[Made, Place]]:
        """The batches from a place on, each with the place after it."""
        return ahead(self._run(place), AHEAD)

    def _run(self, place: Place) -> Iterator[tuple[Made, Place]]:
        reader = self.stream.reader(place["epoch"], place["row"], place["state"])
        with ThreadPoolExecutor(self.threads) as pool:
            while True:
                draws = np.random.default_rng((3, self.seed, place["epoch"], place["row"]))
                window, skipped = self._window(reader)
                after = {"epoch": reader.epoch, "row": reader.row, "state": reader.state(), "batch": 0}
                jobs = self._jobs(window, draws)
                for number in range(place["batch"], len(jobs)):
                    size, waiting = jobs[number]
                    batch = self.maker.stacked(list(pool.map(lambda i: self._row(waiting, i, size), self.maker.mine)))  # noqa: B023
                    batch["skipped"] |= skipped
                    yield batch, {**place, "batch": number + 1} if number + 1 < len(jobs) else after
                place = after

    def _row(self, waiting: Sequence[Waiting], at: int, size: Size) -> tuple[Made, dict[str, str]]:
        """A row of a batch; another of its examples takes the place of one that is broken."""
        turned = [*waiting[at:], *waiting[:at]]
        return self.maker.row(((epoch, number, one.name, lambda one=one: one) for epoch, number, one in turned), size)

    def _window(self, reader: Reader) -> tuple[list[Rated], dict[str, str]]:
        """As many examples as a window has, with their ratios width / height, and those that cannot be read."""
        wanted, window, skipped, failed = -(-self.window // self.maker.group) * self.maker.group, [], {}, 0
        while len(window) < wanted:
            epoch, number, row = next(reader)
            try:
                example = reader.example(epoch, number, row)
                width, height = upright_size(example.image, example.name) if len(self.sizes) > 1 else (1, 1)
            except FileError as error:
                failed += 1
                if not self.maker.skip:
                    raise
                if failed >= TRIES:
                    raise FileError(f"{failed} rows one after another cannot be read; the last: {error}") from None
                skipped[f"Row {number} of {reader.what}"] = str(error)
            else:
                failed = 0
                window.append((width / height, (epoch, number, example)))
        return window, skipped

    def _jobs(self, window: list[Rated], draws: np.random.Generator) -> list[tuple[Size, list[Waiting]]]:
        """The window's batches: a size, and the examples of all processes."""
        window, group = [window[i] for i in draws.permutation(len(window))], self.maker.group
        chosen = nearest(np.asarray([ratio for ratio, _ in window]), self.sizes)
        jobs, rest = [], []
        for number, size in enumerate(self.sizes):
            members = [one for one, bucket in zip(window, chosen, strict=True) if bucket == number]
            full = len(members) // group * group
            jobs += [(size, members[i : i + group]) for i in range(0, full, group)]
            rest += members[full:]
        rest.sort(key=lambda one: one[0])
        for i in range(0, len(rest), group):
            middle = np.exp(np.mean(np.log([ratio for ratio, _ in rest[i : i + group]])))
            jobs.append((self.sizes[int(nearest(np.asarray([middle]), self.sizes)[0])], rest[i : i + group]))
        return [(jobs[i][0], [waiting for _, waiting in jobs[i][1]]) for i in draws.permutation(len(jobs))]


def ahead(items: Iterator[Any], depth: int) -> Iterator[Any]:
    """The items; the next `depth` of them are made in a thread meanwhile."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(pool.submit(next, items, end) for _ in range(depth))
        try:
            while (item := waiting.popleft().result()) is not end:
                waiting.append(pool.submit(next, items, end))
                yield item
        finally:
            for future in waiting:
                future.cancel()
