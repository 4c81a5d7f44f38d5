from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.train.buckets import assign, buckets, nearest


@pytest.mark.parametrize("size", [(512, 512), (768, 512), (1024, 1024), (64, 64)])
@pytest.mark.parametrize("step", [8, 64])
@pytest.mark.parametrize("longest", [1.0, 2.0, 4.0])
def test_areas_are_near_and_sides_are_multiples(size, step, longest):
    found = buckets(size, step=step, longest=longest)
    assert size in found
    assert len(set(found)) == len(found)
    assert set(found) - {size} == {(height, width) for width, height in set(found) - {size}} - {size} | (
        set() if size[0] == size[1] else {size[::-1]} & set(found)
    )
    for width, height in set(found) - {size}:
        assert width % step == height % step == 0
        assert max(width, height) <= longest * min(width, height)
        assert abs(width * height - size[0] * size[1]) <= step / 2 * max(width, height)


def test_no_proportions_within_reach_lie_far_from_a_bucket():
    ratios = np.exp(np.linspace(-np.log(2), np.log(2), 200))
    sizes = buckets((512, 512))
    own = np.asarray([width / height for width, height in sizes])[nearest(ratios, sizes)]
    assert np.abs(np.log(own / ratios)).max() < 0.15


def test_thinly_filled_buckets_are_left_out():
    sizes = [(32, 64), (48, 48), (64, 32)]
    ratios = np.asarray([1.0, 1.0, 0.5, 2.0, 2.0, 1.0])
    found = assign(ratios, sizes, least=2)
    assert {size: numbers.tolist() for size, numbers in found.items()} == {(48, 48): [0, 1, 2, 5], (64, 32): [3, 4]}
    assert list(assign(ratios, sizes, least=7)) == [(48, 48)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"step": 12}, "multiple of 8"), ({"longest": 0.5}, "1 or more times"), ({"size": (500, 512)}, "multiples of 64")],
)
def test_wrong_settings(settings, message):
    with pytest.raises(SfumatoError, match=message):
        buckets(**{"size": (512, 512)} | settings)
