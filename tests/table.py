"""The table of controls that the laws are about. A new control is a new row."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from sfumato import (
    CFG,
    PAG,
    SAG,
    SEGA,
    AttendAndExcite,
    ControlNet,
    DeepCache,
    Depth,
    Edit,
    Inpaint,
    InstructPix2Pix,
    Pix2PixZero,
    TokenMerging,
    Window,
)  # fmt: skip
from sfumato.controls import Control

from pictures import drawing
from pipelines import small_net

ALL = range(8)
"""The pictures of every run here, so that all laws share their compiled programs."""
ROWS = 4
PROMPTS = [f"a {colour} fox" for colour in ("red", "blue", "green", "white", "black", "pink", "grey", "brown")]
CLOSED, OPEN = Window(1.0, 1.0), Window(0.0, 1.0)
Controls = tuple[Control, ...]


@dc.dataclass(frozen=True)
class Row:
    """A control, and what the laws need to know of it."""

    name: str
    kinds: tuple[str, ...]
    """The kinds of tiny model that it runs on (tests/pipelines.py)."""
    make: Callable[..., Controls]
    """(kind, variant, pictures, **changes) -> controls. Variants 0 and 1 differ in all that is data, and in nothing
    else; `pictures` are the numbers of those to be made."""
    beside: Callable[..., Controls]
    """As `make`: the controls that it runs beside, and that are left when it is taken away."""
    neutral: Mapping[str, Any] | None = None
    """Changes that make it do nothing; None if there are none."""
    windowed: bool = False
    """Whether it takes the change `window`."""
    saves: bool = False
    """Whether it is there to compute less, and not more."""

    def both(self, kind: str, variant: int = 0, pictures: Sequence[int] = ALL, **changes: Any) -> Controls:
        return (*self.beside(kind, variant, pictures), *self.make(kind, variant, pictures, **changes))


def nothing(kind, variant, pictures) -> Controls:
    return ()


def cfg(kind, variant=0, pictures=ALL, scale=None, rescale=None) -> Controls:
    return (CFG((5.0, 3.0)[variant] if scale is None else scale, (0.0, 0.2)[variant] if rescale is None else rescale),)


def rescaled(kind, variant=0, pictures=ALL, scale=None, rescale=None) -> Controls:
    return cfg(kind, variant, pictures, scale, (0.7, 0.5)[variant] if rescale is None else rescale)


def drawings(first: int, pictures: Sequence[int]) -> list[Any]:
    """A picture of its own for each that is made."""
    return [drawing(40 + first + 2 * number, 32) for number in pictures]


def controlnet(kind, variant=0, pictures=ALL, scale=None, window=None, guess=False, seed=0) -> Controls:
    scale = (0.8, 0.5)[variant] if scale is None else scale
    window = (OPEN, Window(0.2, 0.9))[variant] if window is None else window
    return (ControlNet(small_net(kind, seed + 2 * variant), drawings(seed + variant, pictures), scale, window, guess),)


def two_controlnets(kind, variant=0, pictures=ALL, **changes) -> Controls:
    return controlnet(kind, variant, pictures, **changes) + controlnet(kind, variant, pictures, seed=1, **changes)


def inpaint(kind, variant=0, pictures=ALL, white=False) -> Controls:
    mask = np.zeros((32, 40), np.uint8)
    mask[:, 20 - 6 * variant :] = 255
    images = [drawing(40, 32).rotate(10 * number + variant) for number in pictures]
    return (Inpaint(images, np.full_like(mask, 255) if white else mask),)


def sega(kind, variant=0, pictures=ALL, scale=None) -> Controls:
    """Something of its own is added to each picture, and later something is taken out of all."""
    moods = [("smiling", "sad", "old")[(number + variant) % 3] for number in pictures]
    edits = [
        Edit(moods, 5.0 + variant if scale is None else scale, (0.9, 0.7)[variant], warmup=variant),
        Edit(("snow", "fog")[variant], 4.0 if scale is None else scale, 0.6, (1, 0)[variant], (None, 3)[variant],
             weight=0.5 + variant, remove=not variant),
    ]  # fmt: skip
    return (SEGA(edits, momentum_scale=(0.3, 0.1)[variant], momentum_beta=(0.4, 0.6)[variant]),)


def sag(kind, variant=0, pictures=ALL, scale=None, window=None) -> Controls:
    window = (OPEN, Window(0.2, 0.9))[variant] if window is None else window
    return (SAG((0.75, 2.0)[variant] if scale is None else scale, window),)


def pag(kind, variant=0, pictures=ALL, scale=None, window=None) -> Controls:
    window = (OPEN, Window(0.2, 0.9))[variant] if window is None else window
    return (PAG((3.0, 2.0)[variant] if scale is None else scale, ["mid", "down_blocks.0.attentions.0"], window),)


def attend_and_excite(kind, variant=0, pictures=ALL, steps=None) -> Controls:
    words = [[PROMPTS[number].split()[1], "fox"][variant:] for number in pictures]
    thresholds = ({0: 0.9}, {1: 0.5})[variant]
    steps = (2, 3)[variant] if steps is None else steps
    return (AttendAndExcite(words, steps, thresholds, (20.0, 30.0)[variant], (3, 2)[variant]),)


def pix2pix_zero(kind, variant=0, pictures=ALL, amount=None, same=False) -> Controls:
    animals = ("cat", "fish")[variant]
    source, target = [f"a fox and a {animals}", "a fox"], [f"a bear and a {animals}"]
    amount = (100.0, 50.0)[variant] if amount is None else amount
    return (Pix2PixZero(source, source if same else target, amount, (OPEN, Window(0.2, 0.9))[variant]),)


def depth(kind, variant=0, pictures=ALL) -> Controls:
    ramp = np.linspace(0, 1 + variant, 40)[:, None] ** np.linspace(1, 3, 40)
    return (Depth([np.roll(ramp, 5 * number, 1) for number in pictures]),)


def instruct_pix2pix(kind, variant=0, pictures=ALL) -> Controls:
    return (InstructPix2Pix(drawings(variant, pictures), *((1.5, 7.5), (3.0, 4.0))[variant]),)


def deepcache(kind, variant=0, pictures=ALL, every=None, window=None) -> Controls:
    window = (OPEN, Window(0.2, 0.9))[variant] if window is None else window
    return (DeepCache((2, 3)[variant] if every is None else every, window=window),)


def token_merging(kind, variant=0, pictures=ALL, window=None) -> Controls:
    return (TokenMerging(0.5, (OPEN, Window(0.2, 0.9))[variant] if window is None else window),)


TABLE = [
    Row("CFG", ("sd1", "sdxl"), cfg, nothing, neutral={"scale": 1.0}),
    Row("CFG, rescaled", ("sd1",), rescaled, nothing, neutral={"scale": 1.0, "rescale": 0.0}),
    Row("ControlNet", ("sd1", "sdxl"), controlnet, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("ControlNet, guess", ("sd1",), functools.partial(controlnet, guess=True), cfg, {"scale": 0.0}, True),
    Row("two ControlNets", ("sd1",), two_controlnets, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("Inpaint", ("sd1",), inpaint, cfg, neutral={"white": True}),
    Row("Inpaint, 9 channels", ("sd1-inpaint",), inpaint, cfg),
    Row("SEGA", ("sd1", "sdxl"), sega, cfg, neutral={"scale": 0.0}),
    Row("SAG", ("sd1", "sdxl"), sag, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("PAG", ("sd1", "sdxl"), pag, cfg, neutral={"scale": 0.0}, windowed=True),
    Row("Attend-and-Excite", ("sd1", "sdxl"), attend_and_excite, cfg, neutral={"steps": 0}),
    Row("Pix2Pix-Zero", ("sd1", "sdxl"), pix2pix_zero, cfg, neutral={"same": True, "amount": 0.0}),
    Row("Depth", ("sd2-depth",), depth, cfg),
    Row("InstructPix2Pix", ("instruct-pix2pix", "sdxl-instruct"), instruct_pix2pix, nothing),
    Row("DeepCache", ("sd1", "sdxl"), deepcache, cfg, neutral={"every": 1}, windowed=True, saves=True),
    Row("token merging", ("sd1", "sdxl"), token_merging, cfg, neutral={"window": CLOSED}, windowed=True, saves=True),
]


def over_table(wanted: Callable[[Row], Any] = lambda row: True, all_kinds: bool = True) -> Any:
    """A law of all rows of the table that are `wanted`, on each of their kinds.

    Or on one of them, where the kind hardly matters to the law and a run is long to compile; rows take turns in which.
    """
    chosen = [(row, row.kinds if all_kinds else (row.kinds[i % len(row.kinds)],)) for i, row in enumerate(TABLE)]
    return pytest.mark.parametrize(("row", "kind"), [
        pytest.param(row, kind, id=f"{row.name}-{kind}") for row, kinds in chosen if wanted(row) for kind in kinds
    ])  # fmt: skip
