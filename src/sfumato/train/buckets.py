"""Aspect buckets: sizes of about one area, so that every batch is of one size and little is cut off the pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from sfumato.errors import SfumatoError
from sfumato.image import check_size

Size = tuple[int, int]


def buckets(size: Size, *, step: int = 64, longest: float = 2.0) -> list[Size]:
    """Sizes (width, height) in multiples of `step` whose areas are near that of `size`, from tall to wide.

    The longer side is at most `longest` times the shorter one. To a width belongs the nearest height, so an area
    differs from that of `size` by at most step / 2 in the height; no size is bigger than `size` by more than that.
    This is the arrangement of NovelAI's aspect ratio bucketing (2022). Raises SfumatoError for a size that is none, a
    step that is not a multiple of 8, or a `longest` below 1.
    """
    if step < 8 or step % 8:
        raise SfumatoError(f"The step of the buckets is a multiple of 8, such as 64, not {step}.")
    if not 1 <= longest < math.inf:
        raise SfumatoError(f"The longest bucket is 1 or more times as long as wide, not {longest}.")
    width, height = check_size(size, step, "The size of the buckets")
    area, found = width * height, {(width, height)}
    for side in range(step, math.floor(math.sqrt(area * longest)) + step, step):
        other = max(round(area / side / step), 1) * step
        if max(side, other) <= longest * min(side, other):
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda one: (one[0] / one[1], one))


def nearest(ratios: Float[np.ndarray, " N"], sizes: Sequence[Size]) -> Int[np.ndarray, " N"]:
    """For each ratio width / height the number of the size whose own is nearest to it, on a logarithmic scale."""
    known = np.log([width / height for width, height in sizes])
    return np.abs(np.log(ratios)[:, None] - known).argmin(axis=1)


def assign(ratios: Float[np.ndarray, " N"], sizes: Sequence[Size], least: int) -> dict[Size, Int[np.ndarray, " n"]]:
    """Which examples are trained at which size, given their ratios width / height.

    A size that fewer than `least` examples fall to is left out, the emptiest first, and its examples go to the nearest
    that remains: a batch of it would be one picture several times.
    """
    sizes = list(sizes)
    while True:
        chosen = nearest(ratios, sizes)
        counts = np.bincount(chosen, minlength=len(sizes))
        if len(sizes) == 1 or counts.min() >= least:
            return {size: np.flatnonzero(chosen == number) for number, size in enumerate(sizes)}
        del sizes[int(counts.argmin())]
