"""Batches of pictures and texts: endless, the same for the same seed, and to be resumed at any batch."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from sfumato.annotators import annotate
from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.image import check_size
from sfumato.train.buckets import Size, assign, buckets
from sfumato.train.examples import Example, Examples, examples
from sfumato.train.feed import Indexed, Loader, Maker, Windowed
from sfumato.train.order import Order
from sfumato.train.prepare import Prepare, check_proportions, upright_size
from sfumato.train.rows import Stream, name_of

__all__ = ["Batches", "Example", "buckets", "examples"]

Annotator = str | Callable[[Image.Image], Any]
"""The name of an annotator, or a function in the place of one."""


class Batches:
    """An endless iterator of batches.

    A batch is {"pixels": float32 [B H W 3] in [-1, 1], "text": B texts, "sizes": float32 [B 6], "index": int64 [B]}
    and, if there are conditioning pictures, "conditioning": float32 [B H W 3] in [0, 1]. "sizes" are what SDXL is
    conditioned by (https://arxiv.org/abs/2307.01952, section 2.2): the picture's height and width, top and left of the
    crop in the resized picture, height and width of the crop. "index" is the number of the example.

    What comes depends on the seed and the examples alone: not on threads, workers, or on how often the run was
    interrupted. `get_state()` before a batch, given to `set_state`, brings that batch again.
    """

    skipped: dict[str, str]
    """The names of the examples that were left out so far because they cannot be read, and why."""

    def __init__(
        self,
        examples: Any,
        *,
        batch: int = 1,
        size: Sequence[Any] = (512, 512),
        seed: int = 0,
        flip: bool = False,
        crop: bool = False,
        zoom: float = 1.0,
        annotator: Annotator | Sequence[Annotator] | None = None,
        annotator_options: Mapping[str, Any] | None = None,
        shard: tuple[int, int] = (0, 1),
        skip_broken: bool = False,
        threads: int = 4,
        workers: int = 0,
        window: int = 1024,
    ):
        """`examples` are what `sfumato.train.data.examples` returns, or a list of `Example`.

        `batch` is the number of rows of this process, process `shard[0]` of `shard[1]`. `size` is (width, height) in
        multiples of 8, or several of them, such as `buckets((512, 512))`: then every batch is of one size, and a
        picture is trained at that which is nearest to its proportions. Pictures are resized to cover the size and
        cropped: in the middle, or with `crop` at a place drawn at random, after they have been enlarged by a factor
        drawn from 1 to `zoom`. With `flip` half of them are mirrored. The `annotator` makes the conditioning picture
        out of what is left of a picture, instead of one that the example has; several take turns. With `skip_broken`
        another example takes the place of one that cannot be read. `threads` or, if it is not 0, `workers` processes
        make the batches; a stream is shuffled within a `window` of so many examples.

        Raises SfumatoError for a setting that does not fit and FileError for pictures that cannot be read, as far as
        their headers tell: of a list all are looked at, of a data set only if there are several sizes.
        """
        _check(batch, seed, shard, threads, workers, window)
        if not (1 <= zoom < math.inf and (crop or zoom == 1)):
            raise SfumatoError(f"zoom is a factor from 1 on, for pictures that are cropped (crop), not {zoom}.")
        sizes = _sizes(size)
        annotators = _annotators(annotator, annotator_options)
        prepare = Prepare(seed, flip, crop, zoom, annotators)
        maker = Maker(prepare, batch, shard, skip_broken)
        self.skipped, count = {}, None
        if isinstance(examples, Stream):
            self._feed = Windowed(examples, maker, sizes, seed, window, max(threads, 1))
        else:
            members, self.skipped = _members(examples, sizes, maker, not annotators)
            count = sum(len(numbers) for _, numbers in members)
            order = Order(tuple(len(numbers) for _, numbers in members), maker.group, seed)
            self._feed = Indexed(Loader(examples, members, order, maker), threads, workers)
        self._facts = {"number of examples": count, "size of the batch": maker.group, "seed": seed,
                       "sizes": [list(one) for one in sizes], "window": None if count else window}  # fmt: skip
        self._place: dict[str, Any] = dict(self._feed.start)
        self._running: Any = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        if self._running is None:
            self._running = self._feed.run(self._place)
        try:
            batch, self._place = next(self._running)
        except BaseException:
            self._running = None
            raise
        self.skipped |= batch.pop("skipped")
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the next batch is; JSON, and the same in all processes but for what they have skipped."""
        return {"data": self._facts, "place": self._place, "skipped": dict(self.skipped)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on where `get_state` was. Raises MismatchError if the examples, or what orders them, are others now."""
        for name, now in self._facts.items():
            before = state["data"].get(name)
            if before != now:
                raise MismatchError(f"The run cannot go on: its {name} was {before} and is {now} now.")
        self.close()
        self._place, self.skipped = dict(state["place"]), self.skipped | state["skipped"]

    def close(self) -> None:
        """Ends the threads and processes; the next batch starts them anew."""
        if self._running is not None:
            self._running.close()
            self._running = None


def _check(batch: int, seed: int, shard: tuple[int, int], threads: int, workers: int, window: int) -> None:
    for name, value, low in [("batch", batch, 1), ("seed", seed, 0), ("threads", threads, 0), ("workers", workers, 0),
                             ("window", window, 1)]:  # fmt: skip
        if value < low:
            raise SfumatoError(f"{name} is a whole number from {low} on, not {value}.")
    index, count = shard
    if not 0 <= index < count:
        raise SfumatoError(f"A shard is (number of the process from 0 on, how many there are), not {shard}.")


def _sizes(size: Any) -> tuple[Size, ...]:
    """One size or several."""
    several = isinstance(size, Sequence) and len(size) > 0 and all(isinstance(one, Sequence) for one in size)
    found = [check_size(one, 8, "What is trained on") for one in (size if several else [size])]
    return tuple(dict.fromkeys(found))


def _annotators(
    wanted: Annotator | Sequence[Annotator] | None, options: Mapping[str, Any] | None
) -> tuple[Callable[[Image.Image], Any], ...]:
    """The annotators as functions. Raises SfumatoError for a name or an option that does not fit, before any picture
    is read."""
    several = (wanted,) if isinstance(wanted, str) or callable(wanted) else tuple(wanted or ())
    if options and not (len(several) == 1 and isinstance(several[0], str)):
        raise SfumatoError("Options are for an annotator that is given by its name, and is the only one.")
    functions = []
    for one in several:
        functions.append(functools.partial(annotate, one, **(options or {})) if isinstance(one, str) else one)
        if isinstance(one, str):
            functions[-1](Image.new("RGB", (64, 64)))
    return tuple(functions)


def _members(
    examples: Examples, sizes: Sequence[Size], maker: Maker, paired: bool
) -> tuple[tuple[tuple[Size, Int[np.ndarray, " n"]], ...], dict[str, str]]:
    """Which examples are trained at which size, and those that are left out."""
    if len(examples) == 0:
        raise SfumatoError("There are no examples.")
    if not isinstance(examples, list) and len(sizes) == 1:
        return ((sizes[0], np.arange(len(examples))),), {}
    numbers, ratios, skipped = _scan(examples, maker.skip, paired)
    chosen = assign(ratios, sizes, maker.group)
    return tuple((size, numbers[places]) for size, places in chosen.items()), skipped


def _scan(
    examples: Examples, skip: bool, paired: bool
) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"], dict[str, str]]:
    """The numbers of the examples whose headers can be read, their ratios width / height, and the others.

    With `paired` the conditioning pictures are looked at too.
    """

    def ratio(number: int) -> float | tuple[str, FileError]:
        name = name_of(examples, number)
        try:
            example = examples[number]
            width, height = upright_size(example.image, name)
            if paired and example.conditioning is not None:
                other = upright_size(example.conditioning, f"{name}'s conditioning picture")
                check_proportions((width, height), other, name)
        except FileError as error:
            return name, error
        return width / height

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ratio, range(len(examples))))
    broken = [one for one in found if isinstance(one, tuple)]
    if broken and not skip:
        raise broken[0][1]
    if len(broken) == len(found):
        raise FileError(f"None of the {len(found)} examples can be read; the first: {broken[0][1]}")
    numbers = [number for number, one in enumerate(found) if not isinstance(one, tuple)]
    ratios = [one for one in found if not isinstance(one, tuple)]
    return np.asarray(numbers), np.asarray(ratios), {name: str(error) for name, error in broken}
