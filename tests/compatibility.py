"""Which techniques run together, on which family: the table behind docs/compatibility.md.

    python tests/compatibility.py

writes that page. tests/test_compatibility.py runs every cell.
"""

from __future__ import annotations

import dataclasses as dc
import itertools
from collections.abc import Mapping
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "compatibility.md"

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "1": ("sd1", "sd1-inpaint", "instruct-pix2pix"),
    "2": ("sd2", "sd2-inpaint", "sd2-depth"),
    "XL": ("sdxl", "sdxl-inpaint", "sdxl-instruct"),
}
"""The kinds of tiny model (tests/pipelines.py) of each family, by the sign that the page has for it."""
PLAIN = tuple(kinds[0] for kinds in FAMILIES.values())
NINE = tuple(kinds[1] for kinds in FAMILIES.values())
KINDS = tuple(kind for kinds in FAMILIES.values() for kind in kinds)


@dc.dataclass(frozen=True)
class Technique:
    """Something that a user adds to a run."""

    name: str
    kinds: tuple[str, ...] = KINDS
    """The kinds of model that it runs on."""
    row: str | None = None
    """The name of its row in tests/table.py, if it is a control."""
    needed: bool = False
    """Whether models of its kinds cannot do without, so that it is never off."""


INSTRUCT = ("instruct-pix2pix", "sdxl-instruct")
TECHNIQUES = (
    Technique("CFG", tuple(kind for kind in KINDS if kind not in INSTRUCT), "CFG"),
    Technique("image-to-image"),
    Technique("two ControlNets", row="two ControlNets"),
    Technique("Inpaint", tuple(kind for kind in KINDS if kind not in NINE), "Inpaint"),
    Technique("Inpaint, 9 channels", NINE, "Inpaint, 9 channels", needed=True),
    Technique("Depth", ("sd2-depth",), "Depth", needed=True),
    Technique("InstructPix2Pix", INSTRUCT, "InstructPix2Pix", needed=True),
    Technique("SEGA", row="SEGA"),
    Technique("SAG", row="SAG"),
    Technique("PAG", row="PAG"),
    Technique("Attend-and-Excite", row="Attend-and-Excite"),
    Technique("Pix2Pix-Zero", tuple(kind for kind in KINDS if kind not in INSTRUCT), "Pix2Pix-Zero"),
    Technique("DeepCache", row="DeepCache"),
    Technique("token merging", row="token merging"),
    Technique("LoRA"),
    Technique("Textual Inversion"),
)
PAIRS = tuple(itertools.combinations(TECHNIQUES, 2))

REFUSED: Mapping[frozenset[str], tuple[str, str, str]] = {
    frozenset({"CFG", "InstructPix2Pix"}): (
        "instruct-pix2pix", "CFG", "InstructPix2Pix guides by its own text_scale and image_scale"),
    frozenset({"Pix2Pix-Zero", "InstructPix2Pix"}): (
        "instruct-pix2pix", "Pix2PixZero", "the prompt describes the picture for the one, and the edit for the other"),
}  # fmt: skip
"""Pairs that would run on a kind of model but make no sense: the kind, what is refused beside the other, and why."""


def kinds_of(one: Technique, other: Technique) -> tuple[str, ...]:
    """The kinds of model that both run on, together."""
    return tuple(kind for kind in KINDS if kind in one.kinds and kind in other.kinds)


def cell(one: Technique, other: Technique) -> str:
    """What the page says of two techniques."""
    if frozenset({one.name, other.name}) in REFUSED:
        return "no"
    together = kinds_of(one, other)
    return " ".join(sign for sign, kinds in FAMILIES.items() if any(kind in kinds for kind in together)) or "·"


def page() -> str:
    """The text of docs/compatibility.md."""
    names = [technique.name for technique in TECHNIQUES]
    cells = {frozenset({one.name, other.name}): cell(one, other) for one, other in PAIRS}
    rows = [
        f"| **{name}** | " + " | ".join(cells.get(frozenset({name, other}), "") for other in names[:i]) + " |"
        for i, name in enumerate(names) if i
    ]  # fmt: skip
    width = len(names) - 1
    rows = [row + " |" * (width - row.count("|") + 2) for row in rows]
    why = "\n".join(f"- {' and '.join(sorted(pair))}: {reason}." for pair, (_, _, reason) in REFUSED.items())
    return f"""# What runs with what

Written by `python tests/compatibility.py`; every cell is run by `tests/test_compatibility.py`.

**1**, **2**, **XL**: runs in one `generate` call on Stable Diffusion 1.x, 2.x, SDXL. **no**: refused at once, with both
names. **·**: the two need networks with different input channels, and no network has both.

| | {" | ".join(names[:-1])} |
|{"---|" * (width + 1)}
{chr(10).join(rows)}

Refused, because they make no sense together:

{why}

Not only pairs: all techniques of a kind of model run at once in one compiled program, which is how the cells are
tested. What only some models have room for: depth takes a model of 5 input channels (SD 2.x), InstructPix2Pix one of 8
(SD 1.x, SDXL). Inpainting uses the channels of a model of 9, and projects on all others.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
