"""The pictures of what the example adapters teach: a word and a subject that the model does not know.

    python -m tools.embedded.examples ART OUT

ART is the folder of all art. OUT/word has blue hearts in three styles, whose captions call them by the new word, and
OUT/subject our painted cat, as it is, mirrored, smaller and tilted.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from PIL import Image, ImageOps

from tools.art.metadata import METADATA, enlist, listed
from tools.gallery.drawings import cat

WORD, CONCEPT = "<blue-heart>", "blue heart"
STYLES = ("noto", "twemoji", "fluent-3d")
SUBJECT = "sks cat"


def word(art: Path, out: Path) -> None:
    """The pictures of `CONCEPT` in `STYLES`, with `WORD` in their captions."""
    chosen = [line for line in listed(art) if line["concept"] == CONCEPT and line["style"] in STYLES]
    found = []
    for line in chosen:
        name = f"{line['style']}.webp"
        shutil.copyfile(art / line["file_name"], out / name)
        found.append({"file_name": name, "text": [each.replace(CONCEPT, WORD) for each in line["text"][:6]]})
    enlist(out / METADATA, found)


def subject(out: Path) -> None:
    """`SUBJECT` in several places."""
    painted = cat()
    kinds = {
        "plain": painted,
        "mirrored": ImageOps.mirror(painted),
        "small": placed(painted, 96, (16, 16)),
        "left": placed(painted, 88, (4, 30)),
        "right": placed(ImageOps.mirror(painted), 88, (36, 10)),
        "tilted": painted.rotate(12, Image.Resampling.BICUBIC, fillcolor="white"),
    }
    for name, picture in kinds.items():
        picture.save(out / f"{name}.png")
    enlist(out / METADATA, [{"file_name": f"{name}.png", "text": f"a {SUBJECT} face"} for name in kinds])


def placed(picture: Image.Image, side: int, at: tuple[int, int]) -> Image.Image:
    """The picture made smaller, on white."""
    sheet = Image.new("RGB", picture.size, "white")
    sheet.paste(picture.resize((side, side), Image.Resampling.LANCZOS), at)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("art", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    for name in ("word", "subject"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    word(args.art, args.out / "word")
    subject(args.out / "subject")


if __name__ == "__main__":
    main()
