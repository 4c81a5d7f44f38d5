"""Sample pictures: what is drawn while something is trained, and the contact sheet that shows it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sfumato import image
from sfumato.controls import CFG, Control
from sfumato.controls.check import finite
from sfumato.errors import SfumatoError
from sfumato.generate import generate
from sfumato.images import Images, Picture
from sfumato.model import Model
from sfumato.noise import checked
from sfumato.samplers import sampler
from sfumato.schedule import Schedule

LINES = 3
"""Lines of a caption at most; what does not fit is cut off."""


@dc.dataclass(frozen=True)
class Sampling:
    """What is drawn again and again. Raises SfumatoError for wishes that no model can fulfil."""

    prompts: tuple[str, ...]
    """What to draw: prompts, instructions, captions; without pictures at least one."""
    pictures: tuple[str, ...] = ()
    """Files: control pictures, pictures before an edit, pictures to rebuild. One a prompt, or one for all."""
    negative: str | None = None
    steps: int = 20
    guidance: float = 7.5
    """The scale of the prompt's guidance."""
    sampler: str | None = None
    """A name of `sfumato samplers`; None for the model's own."""
    size: tuple[int, int] | None = None
    """Width and height in pixels; None for the model's own."""
    seed: int = 0
    """The seed of the first picture; the others follow."""

    def __post_init__(self) -> None:
        for what in ("prompts", "pictures"):
            if isinstance(getattr(self, what), str):
                raise SfumatoError(f"{what} is a list, also if it has just one: [{getattr(self, what)!r}].")
        if not self.prompts and not self.pictures:
            raise SfumatoError("Sample pictures need prompts; give at least one.")
        if self.prompts and len(self.pictures) not in (0, 1, len(self.prompts)):
            raise SfumatoError(
                f"There are {len(self.pictures)} pictures for {len(self.prompts)} sample prompts; give one, or as many."
            )
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise SfumatoError(f"Sample pictures take a whole number of steps from 1 on, not {self.steps!r}.")
        finite("The guidance of sample pictures", self.guidance)
        checked([self.seed])
        if self.sampler is not None:
            sampler(self.sampler, Schedule())
        if self.size is not None:
            image.check_size(self.size)

    def check(self, *, prompts: bool = True, pictures: bool = False) -> None:
        """Says before a model is loaded whether a recipe that draws from `prompts`, from `pictures` or from both can
        draw these. Raises SfumatoError, or FileError for a picture that cannot be read."""
        if prompts and not self.prompts:
            raise SfumatoError("Sample pictures need prompts; give at least one.")
        if pictures and not self.pictures:
            raise SfumatoError("Sample pictures of this training need pictures to start from; give at least one.")
        if self.pictures and not pictures:
            raise SfumatoError("Sample pictures of this training are drawn from prompts alone; leave out the pictures.")
        for name in self.pictures:
            image.read(name)


def drawn(model: Model, wishes: Sampling, controls: Sequence[Control] | None = None) -> Images:
    """What `generate` makes of the prompts, with `controls` instead of plain guidance. Raises as it does."""
    return generate(
        model, list(wishes.prompts), negative=wishes.negative,
        controls=[CFG(wishes.guidance)] if controls is None else controls, sampler=wishes.sampler, steps=wishes.steps,
        size=wishes.size, seed=wishes.seed,
        # A process draws for itself: the devices of others would wait for them.
        devices=None if jax.process_count() == 1 else jax.local_devices(),
    )  # fmt: skip


def sheet(images: Images, wishes: Sampling, folder: str | Path, step: int) -> Path:
    """Writes `folder`/samples/step-000500.png, one sheet of all `images`, and returns its path.

    They come in the order of the prompts, each with its prompt (without any, the name of its picture) below it and,
    where there are pictures in `wishes`, with its own to the left, cut to the same size. The file appears when it is
    complete; its metadata have the whole captions. Raises SfumatoError if it cannot be written, and FileError for a
    picture that cannot be read.
    """
    names = _each(wishes.pictures, len(images))
    captions = _each(wishes.prompts, len(images)) or tuple(Path(name).name for name in names)
    cells = []
    for number, made in enumerate(images):
        row = [made.pil]
        if names:
            row.insert(0, image.resize(image.read(names[number]), made.size))
        cell = captioned(image.grid(row, len(row)), captions[number])
        cells.append(Picture(np.asarray(cell), made.metadata))
    whole = Images(cells).grid()
    whole = dc.replace(whole, metadata={**whole.metadata, "captions": list(captions)})
    return whole.save(Path(folder) / "samples" / f"step-{step:06}.png")


def _each(values: tuple[str, ...], count: int) -> tuple[str, ...]:
    """One for each picture, of one for all or as many."""
    return values * count if len(values) == 1 else values


def captioned(picture: Image.Image, text: str) -> Image.Image:
    """The picture with black text on white below it, in as many lines as it takes, but `LINES` at most."""
    size = max(10, picture.width // 36)
    font, room = ImageFont.load_default(size), picture.width - size
    lines = wrapped(text, lambda line: font.getlength(line) <= room)
    below = round(1.25 * size)
    whole = Image.new("RGB", (picture.width, picture.height + below * len(lines) + size // 2), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((size // 2, picture.height + size // 4 + below * number), line, fill="black", font=font)
    return whole


def wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """The text in lines that fit, `LINES` at most; words that are too long, and the last line, are cut off."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], " ".join(lines[LINES - 1 :])]
    return [line if fits(line) else cut(line, fits) for line in lines]


def cut(line: str, fits: Callable[[str], bool]) -> str:
    """As much of the line as fits with dots behind it."""
    return next((line[:end].rstrip() + "..." for end in range(len(line) - 1, 0, -1) if fits(line[:end] + "...")), "")
