"""`python -m tools.art OUT`: the pictures that the embedded model is trained on, with captions."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tools.art import heldout
from tools.art.build import build, known, select
from tools.art.packages import default_cache, opened
from tools.art.styles import BASE, STYLES, art_of


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    open_package = functools.cache(lambda name: opened(name, options.cache))
    start, concepts = time.perf_counter(), known(open_package)
    aliases = heldout.nouns()
    if options.choose_heldout:
        arts = {style: art_of(STYLES[style], open_package) for style in BASE}
        heldout.write(heldout.choose(concepts, arts, aliases))
        return 0
    try:
        chosen = concepts if options.concepts is None else select(concepts, *_which(options.concepts))
        if options.out.exists() and any(options.out.iterdir()):
            raise ValueError(f"{options.out} is not empty.")
        options.out.mkdir(parents=True, exist_ok=True)
        held = heldout.read() if options.heldout else heldout.HeldOut({})
        counts = build(
            options.out, open_package, chosen, options.styles, held,
            aliases=aliases, size=options.size, limit=options.limit,
        )  # fmt: skip
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    for style in options.styles:
        print(f"{style:14}{counts[style, 'train']:6} pictures {counts[style, 'held out']:5} held out")
    total, apart = (sum(n for (_, kind), n in counts.items() if kind == part) for part in ("train", "held out"))
    print(f"{'in all':14}{total:6} pictures {apart:5} held out in {time.perf_counter() - start:.0f} s: {options.out}")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.art", description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", help="an empty or new folder")
    parser.add_argument("--styles", default=",".join(BASE), help=f"some of {', '.join(STYLES)} (default: %(default)s)")
    parser.add_argument("--concepts", help="a file that lists names, such as tools/art/nouns.txt, or groups (a,b)")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each style")
    parser.add_argument("--size", type=int, default=128, help="width and height in pixels (default: %(default)s)")
    parser.add_argument("--no-heldout", dest="heldout", action="store_false", help="hold nothing out")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where packages are kept (%(default)s)")
    parser.add_argument("--choose-heldout", action="store_true", help="write heldout.json anew, and nothing else")
    options = parser.parse_args(arguments)
    options.styles = tuple(dict.fromkeys(options.styles.split(",")))
    if unknown := [style for style in options.styles if style not in STYLES]:
        parser.error(f"there is no style {', '.join(unknown)}; there are {', '.join(STYLES)}")
    if options.out is None and not options.choose_heldout:
        parser.error("name the folder to write")
    return options


def _which(concepts: str) -> tuple[set[str], set[str]]:
    """The names and the groups that --concepts means."""
    path = Path(concepts)
    return (set(heldout.nouns(path)), set()) if path.is_file() else (set(), set(concepts.split(",")))
