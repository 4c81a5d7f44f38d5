from __future__ import annotations

import collections

import pytest

from sfumato.train.order import Order


@pytest.mark.parametrize("counts", [(7,), (1,), (3, 1, 9), (8, 16), (2, 2, 2, 50)])
@pytest.mark.parametrize("group", [1, 2, 4, 11])
def test_every_example_once_in_each_epoch(counts, group):
    """A bucket's rows, one batch after another, are its examples, all of them epoch by epoch."""
    order, rows = Order(counts, group, seed=5), collections.defaultdict(list)
    total = 3 * sum(counts) // group
    for number in range(total):
        bucket, members = order(number)
        assert len(members) == group
        rows[bucket] += members
    for bucket, members in rows.items():
        count = counts[bucket]
        for at in range(0, len(members), count):
            epoch = members[at : at + count]
            assert {e for e, _ in epoch} == {at // count}
            assert len({place for _, place in epoch}) == len(epoch)
    # No bucket falls back by more than a batch.
    for bucket, count in enumerate(counts):
        assert abs(len(rows[bucket]) - total * group * count / sum(counts)) <= count + group


def test_any_batch_at_once():
    order = Order((5, 3), 2, seed=0)
    assert [order(n) for n in (9, 0, 4)] == [[order(n) for n in range(10)][n] for n in (9, 0, 4)]
    assert order(10**9) == Order((5, 3), 2, seed=0)(10**9)


def test_orders_differ_by_epoch_and_seed():
    def epoch(seed, number):
        return [Order((20,), 1, seed)(n)[1][0][1] for n in range(20 * number, 20 * number + 20)]

    assert sorted(epoch(0, 0)) == sorted(epoch(0, 1)) == list(range(20))
    assert len({tuple(epoch(seed, number)) for seed in (0, 1) for number in (0, 1)}) == 4
