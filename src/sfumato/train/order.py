"""In which order examples are seen: a pure function of the number of the batch, so any batch can be made at once."""

from __future__ import annotations

import bisect
import dataclasses as dc
import functools

import numpy as np
from jaxtyping import Int


@dc.dataclass(frozen=True)
class Order:
    """The endless order of batches of `group` examples, each from one bucket.

    A bucket's examples come in a new order in each epoch, one epoch right behind the other: nothing is left over, and
    no example is seen a second time before all of its bucket were seen once. The buckets take turns at random.
    """

    counts: tuple[int, ...]
    """How many examples each bucket has."""
    group: int
    """How many examples a batch has, all processes together."""
    seed: int

    def __call__(self, number: int) -> tuple[int, list[tuple[int, int]]]:
        """Of batch `number`: its bucket, and for each row (epoch, place in the bucket)."""
        epoch = self.epoch(number)
        turns = self.full(epoch + 1) - self.full(epoch)
        order = _order(self.seed, epoch, tuple(turns.tolist()))
        place = number - int(self.full(epoch).sum())
        bucket = int(order[place])
        batch = int(self.full(epoch)[bucket] + (order[:place] == bucket).sum())
        count, rows = self.counts[bucket], []
        for row in range(batch * self.group, (batch + 1) * self.group):
            passes, at = divmod(row, count)
            rows.append((passes, int(_permutation(self.seed, passes, bucket, count)[at])))
        return bucket, rows

    def full(self, epoch: int) -> Int[np.ndarray, " n"]:
        """How many batches of each bucket are full before that epoch."""
        return np.asarray([epoch * count // self.group for count in self.counts], np.int64)

    def epoch(self, number: int) -> int:
        """The epoch in which a batch becomes full."""
        after = (number + len(self.counts) + 1) * self.group // sum(self.counts) + 2
        return bisect.bisect_right(range(after), number, key=lambda epoch: int(self.full(epoch).sum())) - 1


@functools.lru_cache(maxsize=4)
def _order(seed: int, epoch: int, turns: tuple[int, ...]) -> Int[np.ndarray, " n"]:
    """The turns of the buckets in an epoch."""
    return np.random.default_rng((1, seed, epoch)).permutation(np.repeat(np.arange(len(turns)), turns))


@functools.lru_cache(maxsize=64)
def _permutation(seed: int, epoch: int, bucket: int, count: int) -> Int[np.ndarray, " n"]:
    """The order of a bucket's examples in an epoch."""
    return np.random.default_rng((2, seed, epoch, bucket)).permutation(count)
