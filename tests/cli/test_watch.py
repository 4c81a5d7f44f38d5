"""Watching a run."""

from __future__ import annotations

import signal
import sys

import pytest

from sfumato.cli.watch import Watch, covered


class Lost:
    """Is interrupted where an exception has nowhere to go."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interruption_that_gets_lost_ends_the_run_after_the_row_and_prints_nothing(capfd):
    before = sys.unraisablehook, signal.getsignal(signal.SIGINT)
    watch = Watch(1, quiet=True)
    watch.loading("model")
    with watch:
        watch.progress(1, 2, 0.0)
        Lost()
        with pytest.raises(KeyboardInterrupt):
            watch.progress(2, 2, 0.0)
    assert capfd.readouterr().err == ""
    assert (sys.unraisablehook, signal.getsignal(signal.SIGINT)) == before


def test_spans_that_lie_in_each_other_count_once():
    assert covered([(1, 4), (2, 3), (5, 9)], 0, 7) == 5
