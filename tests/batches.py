"""Batches of training data in tests."""

from __future__ import annotations

import itertools

import numpy as np


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_same(some, others):
    """The same batches, to the bit."""
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        assert one["text"] == other["text"]
        for key in one.keys() - {"text"}:
            np.testing.assert_array_equal(one[key], other[key])
            assert one[key].dtype == other[key].dtype
