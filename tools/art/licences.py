"""Whose the pictures are and on what terms they may be used."""

from __future__ import annotations

from collections.abc import Iterable

from tools.art.packages import PACKAGES, Package
from tools.art.styles import STYLES

TITLES = {
    "Apache-2.0": "Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0",
    "CC-BY-4.0": "Creative Commons Attribution 4.0 International, https://creativecommons.org/licenses/by/4.0/",
    "MIT": "MIT License, https://opensource.org/license/mit",
}
MIT = """\
Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
NAMES = ("unicode-emoji-json", "emojibase-data", "emojilib")
"""The packages that captions are made from."""


def licences(styles: Iterable[str]) -> str:
    """The text of LICENSES.md for a folder with pictures of these styles."""
    lines = [
        "# Licences of these pictures",
        "",
        "Each picture was drawn at another size, on a white ground, from the art named here. Its mask is the art's own",
        "outline, and its map of regions the art's shapes in flat colours. The art is otherwise unchanged.",
        "",
    ]
    for style in styles:
        package = PACKAGES[STYLES[style].package]
        lines += [f"## pictures/{style}", "", *_terms(package), ""]
    lines += ["## Names, groups and keywords in the captions", ""]
    for name in NAMES:
        lines += [*_terms(PACKAGES[name]), ""]
    lines += ["## The MIT License", "", MIT]
    return "\n".join(lines)


def _terms(package: Package) -> list[str]:
    return [
        f"- Copyright (c) {package.author}, {package.source}",
        f"- {TITLES[package.licence]}",
        f"- Taken from the npm package {package.name} {package.version}.",
    ]
