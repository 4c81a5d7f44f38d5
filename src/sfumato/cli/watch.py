"""Watching a run: a progress bar, and how long each part took."""

from __future__ import annotations

import signal
import sys
import time
from typing import Any

import jax
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COMPILING = "/jax/core/compile/"
"""What jax's own events of tracing, lowering and compiling begin with."""


class Watch:
    """Watches one run: a context, whose `progress` goes into `generate`.

    Unless `quiet`, it tells on standard error what took how long, with a bar if that is a terminal.
    """

    def __init__(self, rounds: int, *, quiet: bool):
        self.rounds, self.quiet = rounds, quiet
        self.seconds: dict[str, float] = {}
        self.spans: list[tuple[float, float]] = []
        self.ends: list[float] = []
        """When each row was done."""
        self.interrupted = False
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=console, transient=True, disable=quiet or not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("compiling", total=None, start=False)

    def loading(self, name: str) -> None:
        """Starts the clock, and says what is read."""
        self.began = time.time()
        if not self.quiet and sys.stderr.isatty():
            self.say(f"Loading {name}")

    def __enter__(self) -> Watch:
        self.seconds["load"] = time.time() - self.began
        self.say(f"Loaded in {self.seconds['load']:.1f} s")
        self.began = time.time()
        jax.monitoring.register_event_time_span_listener(self._compiled)
        self.before = signal.signal(signal.SIGINT, self._interrupt)
        self.report = sys.unraisablehook
        sys.unraisablehook = self._unraisable
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGINT, self.before)
        sys.unraisablehook = self.report
        self.bar.stop()
        jax.monitoring.unregister_event_time_span_listener(self._compiled)

    def progress(self, row: int, rows: int, preview: Any) -> None:
        """A row is done; called as `generate` calls its `progress`."""
        # It has only been asked for: without waiting the bar would be full at once.
        jax.block_until_ready(preview)
        if self.interrupted:
            raise KeyboardInterrupt
        self.ends.append(time.time())
        if len(self.ends) == 1:
            self._say_compiled()
            self.bar.start_task(self.task)
        total = rows * self.rounds
        doing = "sampling" if len(self.ends) < total else "decoding"
        self.bar.update(self.task, description=doing, completed=len(self.ends), total=total)

    def _interrupt(self, *_: Any) -> None:
        """Ctrl-C ends the run at once, or after this row where the exception got lost: as it does if it is raised in
        something that jax calls, such as a listener or a destructor."""
        self.interrupted = True
        raise KeyboardInterrupt

    def _unraisable(self, lost: Any) -> None:
        """Says nothing of an exception that `_interrupt` has raised where it got lost."""
        if not (self.interrupted and issubclass(lost.exc_type, KeyboardInterrupt)):
            self.report(lost)

    def done(self) -> None:
        """The pictures are there."""
        now = time.time()
        sampled = self.ends[-1] if self.ends else now
        self.seconds["compile"] = covered(self.spans, self.began, now)
        self.seconds["sample"] = sampled - self.began - covered(self.spans, self.began, sampled)
        self.seconds["decode"] = now - sampled - covered(self.spans, sampled, now)

    def say(self, line: str) -> None:
        """A line on standard error, above the bar."""
        if self.quiet:
            return
        if self.bar.live.is_started:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            typer.echo(line, err=True)

    def _say_compiled(self) -> None:
        seconds = covered(self.spans, self.began, time.time())
        if seconds >= 1:
            self.say(f"Compiled in {seconds:.1f} s")

    def _compiled(self, event: str, start_time: float, end_time: float, **_: Any) -> None:
        if event.startswith(COMPILING):
            self.spans.append((start_time, end_time))


def covered(spans: list[tuple[float, float]], first: float, last: float) -> float:
    """The seconds between `first` and `last` that lie in any of the spans, which may lie in each other."""
    total, until = 0.0, first
    for start, end in sorted(spans):
        start, end = max(start, until), min(end, last)
        if end > start:
            total, until = total + end - start, end
    return total
