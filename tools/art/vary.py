"""Further pictures out of those of a folder of `tools.art`: in other colours, and two things side by side.

    python -m tools.art.vary ART OUT [--colours 2] [--pairs 500] [--also MORE]

Emoji hardly ever come in two colours, and never two in one picture, so that a model that has seen nothing else knows
neither what a colour is nor what "and" means. OUT gets the pictures of ART, each in up to so many other colours, and
pairs of all of these, with captions that say so; and of MORE, another such folder, what ART does not have, as it is.
What is held out is not touched. All choices are drawn by hashes of names.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses as dc
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tools.art.captions import ordered, with_article
from tools.art.metadata import METADATA, enlist, listed
from tools.art.recolour import COLOURS, colour_of, recoloured
from tools.art.styles import STYLES


@dc.dataclass(frozen=True)
class Thing:
    """A picture of one thing, as it came or in another colour."""

    picture: np.ndarray
    name: str
    colour: str | None
    line: dict[str, Any]
    """What is said of the picture that it is made of."""
    changed: bool = False
    """Whether it is in another colour than that picture."""

    @property
    def plain(self) -> str:
        """What it is, such as "a fox"."""
        return with_article(self.name)

    @property
    def said(self) -> str:
        """The same with its colour, such as "a blue fox"."""
        return with_article(self.name if self.colour is None else f"{self.colour} {self.name}")

    @property
    def words(self) -> str:
        """What its style is called."""
        return STYLES[self.line["style"]].words


def things(art: Path, colours: int) -> Iterator[Thing]:
    """Each picture, as it is and in up to so many other colours."""
    for line in listed(art):
        picture = np.array(Image.open(art / line["file_name"]).convert("RGB"))
        first, _, rest = line["concept"].partition(" ")
        name, own = (rest, first) if first in COLOURS and rest else (line["concept"], colour_of(picture))
        yield Thing(picture, name, own, line)
        for colour in ordered(set(COLOURS) - {own}, f"{line['concept']}|{line['style']}")[:colours]:
            other = recoloured(picture, colour)
            if other is not None:
                yield Thing(other, name, colour, line, changed=True)


def pairs(found: Sequence[Thing], count: int) -> Iterator[tuple[Thing, Thing]]:
    """Two things of one style, never the same, each thing in about as many pairs as every other."""
    styles = collections.defaultdict(list)
    for thing in found:
        styles[thing.line["style"]].append(thing)
    if not any(len({one.name for one in some}) > 1 for some in styles.values()):
        return iter(())
    drawn = (pair for turn in itertools.count() for pair in _shuffled(styles, turn) if pair[0].name != pair[1].name)
    return itertools.islice(drawn, count)


def _shuffled(styles: dict[str, list[Thing]], turn: int) -> list[tuple[Thing, Thing]]:
    """All things in pairs, the styles mixed."""
    made = []
    for some in styles.values():
        order = ordered(some, f"{turn}", lambda thing: f"{thing.said}|{thing.words}")
        made += zip(order[::2], order[1::2], strict=False)
    return ordered(made, f"{turn}", lambda pair: f"{pair[0].said}|{pair[1].said}|{pair[0].words}")


def captions_in_colour(thing: Thing) -> list[str]:
    """The captions of one thing that say its colour."""
    words, bare = thing.words, f"{thing.colour} {thing.name}"
    return [f"{bare}, {words}", f"{thing.said}, {words} style", f"{bare}, {words} style", thing.said,
            f"{thing.plain}, {thing.colour}, {words} style", f"{words} {bare}"]  # fmt: skip


def captions_of_two(left: Thing, right: Thing) -> list[str]:
    """The captions of two things side by side: in colour, and without where both are as they came."""
    names = [(left.said, right.said)] + ([] if left.changed or right.changed else [(left.plain, right.plain)])
    words = left.words
    found = [text for one, other in names for text in (
        f"{one} and {other}, {words} style", f"{other} and {one}, {words} style", f"{one} and {other}, {words}",
        f"{one} beside {other}, {words} style", f"{one} on the left, {other} on the right, {words} style",
        f"{one} and {other}",
    )]  # fmt: skip
    return list(dict.fromkeys(found))


def side_by_side(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures, each at half its size, on white."""
    side = left.shape[0]
    sheet = Image.new("RGB", (side, side), "white")
    for number, picture in enumerate((left, right)):
        half = Image.fromarray(picture).resize((side // 2, side // 2), Image.Resampling.LANCZOS)
        sheet.paste(half, (number * side // 2, side // 4))
    return np.array(sheet)


def vary(art: Path, out: Path, colours: int, count: int, also: Path | None = None) -> list[dict[str, Any]]:
    """Writes the folder `out` and returns the lines that say what is in it."""
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    found, lines = list(things(art, colours)), list[dict[str, Any]]()

    def add(picture: np.ndarray, texts: list[str], **facts: Any) -> None:
        name = f"pictures/{len(lines):05}.webp"
        Image.fromarray(picture).save(out / name, lossless=True)
        lines.append({"file_name": name, "text": texts, **facts})

    for thing in found:
        texts = ([] if thing.changed else thing.line["text"]) + (captions_in_colour(thing) if thing.colour else [])
        add(thing.picture, texts, concept=thing.name, style=thing.line["style"], colour=thing.colour)
    as_they_came = [thing for thing in found if not thing.changed]
    for left, right in [*pairs(as_they_came, count // 2), *pairs(found, count - count // 2)]:
        add(side_by_side(left.picture, right.picture), captions_of_two(left, right), style=left.line["style"],
            concept=f"{left.name} and {right.name}")  # fmt: skip
    known = {(thing.line["concept"], thing.line["style"]) for thing in found}
    for line in listed(also) if also else ():
        if (line["concept"], line["style"]) not in known:
            lines.append(line | {"file_name": f"pictures/{len(lines):05}.webp"})
            shutil.copyfile(also / line["file_name"], out / lines[-1]["file_name"])
    enlist(out / METADATA, lines)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--colours", type=int, default=2, help="other colours for each picture")
    parser.add_argument("--pairs", type=int, default=500, help="pictures of two things")
    parser.add_argument("--also", type=Path, help="a folder of further pictures, which are not varied")
    args = parser.parse_args()
    print(f"{len(vary(args.art, args.out, args.colours, args.pairs, args.also))} pictures: {args.out}")


if __name__ == "__main__":
    main()
