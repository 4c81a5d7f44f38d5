"""What was found in a LoRA file, and how it meets the layers of a model."""

from __future__ import annotations

import dataclasses as dc
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from sfumato.io.broken import plain
from sfumato.io.family import Family

T = TypeVar("T")

SHOWN = 3
"""Unmatched names that are printed."""


@dc.dataclass(frozen=True)
class Matched:
    """A layer that a file changes."""

    name: str
    """As the file has it."""
    component: str
    path: str
    rank: int | None
    """None for a change that is whole."""
    alpha: float | None
    """None where the file says nothing: then it is the rank."""
    scale: float
    """What the matrices are multiplied by: alpha / rank, or alpha / sqrt(rank) in rank-stabilised files."""


@dc.dataclass(frozen=True)
class Unmatched:
    """A layer in a file, or a tensor outside of all layers, that cannot be used."""

    name: str
    why: str
    nearest: str | None = None
    """The layer of the model with the most similar name, for the first few."""

    def __str__(self) -> str:
        near = f", the nearest is {self.nearest}" if self.nearest else ""
        return f"{plain(self.name)} ({self.why}{near})"


@dc.dataclass(frozen=True)
class Report:
    """What a LoRA file holds and what of it fits. `str` of it is a few lines for people."""

    path: Path
    format: str
    """"kohya", "diffusers", "diffusers (old)", "diffusers (PEFT names)", "PEFT" or "cloneofsimo"."""
    family: Family | None
    """By its shapes; where they do not tell, that of the model that it fits, None if there is no single one."""
    variant: str
    """Such as "LoRA", "LoCon (LoRA with convolutions)", "LoHa", "LoKr", "LoRA + DoRA", "full difference"."""
    matched: tuple[Matched, ...]
    unmatched: tuple[Unmatched, ...]
    beyond: int = 0
    """Layers that were left alone because only a ControlNet was there, which has no decoder and no text encoders."""
    tokens: tuple[str, ...] = ()
    """New tokens whose vectors the file carries."""
    target: str = "the model"
    """What the layers were looked for in, in words."""

    @property
    def ranks(self) -> dict[int | None, int]:
        """How many layers have which rank."""
        return _counted([layer.rank for layer in self.matched])

    @property
    def scales(self) -> dict[tuple[float | None, int | None, float], int]:
        """How many layers have which (alpha, rank, scale)."""
        return _counted([(layer.alpha, layer.rank, layer.scale) for layer in self.matched])

    def rows(self) -> dict[str, str]:
        """What to print, by name."""
        count = len(self.matched) + len(self.unmatched)
        parts = Counter(layer.component for layer in self.matched)
        rows = {"format": self.format, "variant": self.variant, "rank": _ranks(list(self.ranks))}
        rows["alphas"] = "; ".join(_scale(*key, layers) for key, layers in self.scales.items()) or "none"
        each = ", ".join(f"{component} {number}" for component, number in parts.items())
        rows["matched"] = f"{len(self.matched)} of {count} layers in {self.target}" + (f": {each}" if each else "")
        if self.beyond:
            rows["left out"] = f"{self.beyond} layers that a ControlNet does not have"
        if self.unmatched:
            more = len(self.unmatched) - SHOWN
            rows["unmatched"] = ", ".join(map(str, self.unmatched[:SHOWN])) + (f" and {more} more" if more > 0 else "")
        if self.tokens:
            rows["embedded tokens"] = plain(", ".join(self.tokens))
        return rows

    def problem(self) -> str | None:
        """What does not fit, as a part of a sentence; None if all does."""
        if not self.unmatched:
            return None
        count, lost = len(self.matched) + len(self.unmatched), len(self.unmatched)
        which = f"{lost} of its {count} layers cannot" if lost < count else f"none of its layers ({count}) can"
        return f"{which} be used in {self.target}, first {self.unmatched[0]}"

    def __str__(self) -> str:
        rows = self.rows()
        width = max(map(len, rows))
        family = f" for {self.family.full_name}" if self.family else ""
        lines = [str(self.path), f"  lora{family}", *(f"  {name:{width}}  {value}" for name, value in rows.items())]
        return "\n".join(lines)


def _counted(values: Sequence[T]) -> dict[T, int]:
    """How often each occurs, the most frequent first, whatever the order in the file."""
    return dict(sorted(Counter(values).items(), key=lambda item: (-item[1], str(item[0]))))


def _ranks(ranks: Sequence[int | None]) -> str:
    known = [rank for rank in ranks if rank is not None]
    if not known:
        return "full"
    return str(known[0]) if len(known) == 1 else f"{min(known)} to {max(known)}"


def _scale(alpha: float | None, rank: int | None, scale: float, layers: int) -> str:
    by = f"alpha {alpha:g}" if alpha is not None else "no alpha"
    on = f"rank {rank}" if rank is not None else "no rank"
    return f"{by}, {on} (x {scale:.4g}): {layers} layers"
