"""The pictures of a folder of `tools.art`, in memory."""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tools.art.metadata import listed

HELDOUT = "heldout"


@dc.dataclass(frozen=True)
class Art:
    """Pictures and what is known of each."""

    pictures: UInt8[np.ndarray, "N H W 3"]
    lines: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def concepts(self) -> list[str]:
        """What each shows."""
        return [line["concept"] for line in self.lines]

    @property
    def prompts(self) -> list[str]:
        """Its plainest caption, such as "red apple, noto"."""
        return [line["text"][0] for line in self.lines]

    def pairs(self) -> Art:
        """Those that were held out as a pair of a concept, which was seen in another style, and a style."""
        chosen = [i for i, line in enumerate(self.lines) if line.get("why") == "pair"]
        return Art(self.pictures[chosen], [self.lines[i] for i in chosen])

    def take(self, count: int, seed: int = 0) -> Art:
        """So many of them, drawn without repetition; all in another order if there are fewer."""
        order = np.random.default_rng(seed).permutation(len(self.lines))[:count]
        return Art(self.pictures[order], [self.lines[i] for i in order])


def read(folder: Path) -> Art:
    """All pictures of a folder with metadata.jsonl."""
    lines = listed(folder)
    pictures = [np.asarray(Image.open(folder / line["file_name"]).convert("RGB")) for line in lines]
    return Art(np.stack(pictures), lines)
