"""What a run tells: a line of JSON a step, TensorBoard, a progress bar."""

from __future__ import annotations

import collections
import contextlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sfumato.errors import SfumatoError

WINDOW = 20
"""Steps that the pace is averaged over."""


class Metrics:
    """The metrics of a run, as a context. One process of a run writes; `write=False` for all others.

    `folder`/metrics.jsonl has one line a step: {"step": 1, "loss": 0.5, ..., "samples_per_second": 12.0}. With
    `tensorboard` the same numbers are written to `folder`/tensorboard too. Steps after `start` that an earlier run has
    left there are dropped, because they will be done again. The bar is on standard error, if that is a terminal
    and not `quiet`.

    Raises SfumatoError for a folder that cannot be written, and if tensorboardX is wanted and missing.
    """

    def __init__(
        self, folder: Path | None, *, start: int = 0, steps: int = 0, tensorboard: bool = False, quiet: bool = False,
        write: bool = True,
    ):  # fmt: skip
        self.file, self.board, self.folder = None, None, folder
        if folder is not None and write:
            path = folder / "metrics.jsonl"
            try:
                keep(path, start)
                self.file = path.open("a", encoding="utf-8")
            except OSError as error:
                raise SfumatoError(f"The metrics cannot be written to {path}: {error.strerror}.") from error
            self.board = board(folder / "tensorboard", start) if tensorboard else None
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(), console=console, disable=quiet or not write or not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=steps, completed=start, told="")
        self.done: collections.deque[tuple[float, int]] = collections.deque(maxlen=WINDOW)

    def __enter__(self) -> Metrics:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written has been told
                self.file.close()
        if self.board is not None:
            self.board.close()

    def add(self, step: int, metrics: Mapping[str, float], samples: int) -> None:
        """Step number `step` (from 1) is done, of `samples` examples. Raises SfumatoError if nothing can be written."""
        pace = self._pace(samples)
        told = f"loss {metrics['loss']:.4g}" + (f"  {pace:.3g} samples/s" if pace else "")
        self.bar.update(self.task, completed=step, told=told)
        if self.file is None:
            return
        # JSON has no name for what is not finite.
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        line = {"step": step, **finite} | ({"samples_per_second": round(pace, 3)} if pace else {})
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
            if self.board is not None:
                for name, value in metrics.items():
                    self.board.add_scalar(name, value, step)
        except OSError as error:
            raise SfumatoError(
                f"The metrics of step {step} cannot be written to {self.folder}: {error.strerror}."
            ) from error

    def _pace(self, samples: int) -> float | None:
        """Samples a second over the last steps; the first is left out, because it was compiled in."""
        self.done.append((time.monotonic(), samples))
        seconds = self.done[-1][0] - self.done[0][0]
        return sum(count for _, count in list(self.done)[1:]) / seconds if seconds > 0 else None


def keep(path: Path, last: int) -> None:
    """Drops the lines of `path` after step `last`, and the rest of a line that a killed run was writing."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= last:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # broken off, or not ours
    new = path.with_name(path.name + ".new")
    new.write_text("".join(lines), encoding="utf-8")
    new.replace(path)


def board(folder: Path, start: int) -> Any:
    """A writer of TensorBoard's files, in which steps after `start` are void."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise SfumatoError("TensorBoard files need tensorboardX: pip install tensorboardX.") from error
    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
