"""Draws the pictures of docs/gallery and writes the page about them.

    python -m tools.gallery [--out docs/gallery] [--only NAME ...]

Each entry of `entries.ENTRIES` is a command or some lines of Python, run as they are printed on the page.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import time
from pathlib import Path
from typing import Any

from tools.gallery.drawings import draw
from tools.gallery.entries import ENTRIES, INTRODUCTION, SECTIONS, Entry

PAGE = "README.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/gallery"))
    parser.add_argument("--only", nargs="+", choices=[entry.name for entry in ENTRIES], metavar="NAME")
    args = parser.parse_args()
    draw(args.out)
    names: dict[str, Any] = {}
    with contextlib.chdir(args.out):
        exec("import sfumato\n\nmodel = sfumato.load('emoji')", names)
        for entry in ENTRIES:
            if not args.only or entry.name in args.only:
                began = time.perf_counter()
                run(entry, dict(names))
                print(f"{entry.name:24} {time.perf_counter() - began:6.1f} s", flush=True)
    (args.out / PAGE).write_text(page(), encoding="utf-8")


def run(entry: Entry, names: dict[str, Any]) -> None:
    """Makes the pictures of an entry in the current folder."""
    if entry.command:
        from typer.testing import CliRunner

        from sfumato.cli import app

        done = CliRunner().invoke(app, [*shlex.split(entry.code.replace("\\\n", " "))[1:], "--quiet"])
        if done.exception is not None:
            raise done.exception
    else:
        exec(entry.code, names)
    if not Path(entry.file).is_file():
        raise SystemExit(f"{entry.name} did not write {entry.file}")


def page() -> str:
    """The text of the page."""
    parts = [INTRODUCTION]
    for section, words in SECTIONS.items():
        parts.append(f"## {section}\n\n{words}".rstrip())
        for entry in ENTRIES:
            if entry.section == section:
                language = "" if entry.command else "python"
                parts.append(f"### {entry.title}\n\n![{entry.title}]({entry.file})\n\n```{language}\n{entry.code}\n```")
                parts.append(entry.words)
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main()
