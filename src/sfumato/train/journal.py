"""What a run notes and draws while it goes on."""

from __future__ import annotations

import dataclasses as dc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from sfumato.image import write_atomically
from sfumato.train import shard
from sfumato.train.samples import Sampling, sheet
from sfumato.train.settings import Settings
from sfumato.train.step import State
from sfumato.train.task import Task

HISTORY = "history.json"
"""How long the parts of a run took."""


@dc.dataclass
class Journal:
    """Looks on at every step: draws contact sheets, and notes how long it takes."""

    out: Path
    settings: Settings
    task: Task
    wishes: Sampling | None
    devices: int
    began: float
    start: int | None = None
    """Steps that were done before this part of the run."""
    earlier: list[dict[str, Any]] = dc.field(default_factory=list)
    """What is noted of the parts before."""
    drawn: int | None = None
    """The step of the last contact sheet."""

    def __call__(self, step: int, state: Callable[[], State], metrics: Mapping[str, jax.Array]) -> None:
        if self.start is None:
            self.start = step - 1
            self.earlier = read_history(self.out) if self.start else []
        if step % self.settings.run.save_every == 0:
            self.write(step)
        if self.wishes is not None and step % self.settings.samples.every == 0:
            # All processes gather, whichever draws; and before the next step, which overwrites these arrays.
            now = state()
            self.draw(step, shard.gather(now.trainable if now.ema is None else now.ema))

    def draw(self, step: int, trained: Any) -> None:
        """Writes a contact sheet of whole arrays."""
        self.drawn = step
        if self.wishes is not None and jax.process_index() == 0:
            sheet(self.task.draw(trained, self.wishes), self.wishes, self.out, step)

    def write(self, step: int) -> None:
        """Notes that so many steps are done."""
        if jax.process_index() > 0 or self.start is None:
            return
        seconds = round(time.monotonic() - self.began, 1)
        part = {"from": self.start, "to": step, "seconds": seconds, "devices": self.devices}
        write_json(self.out / HISTORY, [*self.earlier, part])


def read_history(out: Path) -> list[dict[str, Any]]:
    """The parts that a run was done in."""
    path = out / HISTORY
    try:
        return json.loads(path.read_text("utf-8")) if path.is_file() else []
    except ValueError:
        return []  # not ours; it is written anew


def write_json(path: Path, value: Any) -> None:
    """Writes it, complete or not at all."""
    write(path, json.dumps(value, indent=2) + "\n")


def write(path: Path, text: str) -> None:
    """Writes it, complete or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))
