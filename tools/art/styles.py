"""The styles: which package draws them, in which form, and the art that it has for each concept."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tools.art.names import Concept, has_skin_tone, key_of_file
from tools.art.packages import Files, load_json

VIEW = "http://www.w3.org/2000/svg"
LINKS = "http://www.w3.org/1999/xlink"


@dc.dataclass(frozen=True)
class Style:
    """A style of drawing, as captions call it."""

    name: str
    package: str
    words: str
    """What a caption calls it."""
    named_by: str | None = None
    """The package that tells code points for this one's names, if it does not do so itself."""
    twin: str | None = None
    """The style that draws the same shapes as SVG: what is held out of one is held out of the other too."""
    spare: bool = False
    """Kept from the base model, for a LoRA that learns it."""


STYLES = {
    style.name: style
    for style in [
        Style("noto", "@iconify-json/noto", "noto"),
        Style("twemoji", "@iconify-json/twemoji", "twemoji"),
        Style("fluent-3d", "@lobehub/fluent-emoji-3d", "fluent 3d", twin="fluent-color"),
        Style("fluent-color", "@iconify-json/fluent-emoji", "fluent color", "@iconify-json/fluent-emoji-flat"),
        Style("fluent-flat", "@iconify-json/fluent-emoji-flat", "fluent flat"),
        Style("noto-blob", "@iconify-json/noto-v1", "noto blob", "@iconify-json/noto", spare=True),
    ]
}
BASE = tuple(name for name, style in STYLES.items() if not style.spare)


@dc.dataclass(frozen=True)
class Art:
    """One drawing: an SVG text, or the bytes of a picture file."""

    svg: str | None = None
    picture: bytes | None = None


class IconSet:
    """Art of a package in Iconify's format: all drawings in one icons.json.

    `named_by` are the packages whose chars.json tell which code points a name stands for; without any its own does.
    """

    def __init__(self, files: Files, named_by: Iterable[Files] = ()):
        self._icons = load_json(files, "icons.json")
        self._by_key: dict[str, str] = {}
        own = load_json(files, "chars.json") if "chars.json" in files.names() else {}
        self._take({name: _key(code) for code, name in own.items()})
        for other in named_by:
            self._take(_names(other))

    def _take(self, keys: Mapping[str, str]) -> None:
        for name, key in keys.items():
            if name in self._icons["icons"] and not has_skin_tone(key):
                self._by_key.setdefault(key, name)

    def find(self, concept: Concept) -> Callable[[], Art] | None:
        """What reads the art of a concept, or None if the set has none."""
        name = self._by_key.get(concept.key)
        if name is None and concept.slug in self._icons["icons"]:
            name = concept.slug
        return None if name is None else lambda: Art(svg=self._svg(name))

    def _svg(self, name: str) -> str:
        icon = self._icons["icons"][name]
        left, top, width, height = (
            icon.get(side, self._icons.get(side, default))
            for side, default in [("left", 0), ("top", 0), ("width", 16), ("height", 16)]
        )
        # An oblong drawing lies in the middle of a square.
        side = max(width, height)
        box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
        return f'<svg xmlns="{VIEW}" xmlns:xlink="{LINKS}" viewBox="{box}">{icon["body"]}</svg>'


class FileSet:
    """Art of a package with one picture file for each emoji, named by its code points."""

    def __init__(self, files: Files):
        self._files = files
        self._by_key: dict[str, str] = {}
        for name in files.names():
            key = key_of_file(name) if name.endswith((".webp", ".png")) else None
            if key and not has_skin_tone(key):
                self._by_key.setdefault(key, name)

    def find(self, concept: Concept) -> Callable[[], Art] | None:
        name = self._by_key.get(concept.key)
        return None if name is None else lambda: Art(picture=self._files.read(name))


def art_of(style: Style, open_package: Callable[[str], Any]) -> IconSet | FileSet:
    """The drawings of a style; `open_package` gives the files of a package by its name."""
    files = open_package(style.package)
    if "icons.json" not in files.names():
        return FileSet(files)
    return IconSet(files, [open_package(style.named_by)] if style.named_by else [])


def _key(code: str) -> str:
    return key_of_file(code) or code


def _names(files: Files) -> dict[str, str]:
    """The keys by name that a package knows, its older names among them."""
    keys = {name: _key(code) for code, name in load_json(files, "chars.json").items()}
    for name, alias in load_json(files, "icons.json").get("aliases", {}).items():
        if alias["parent"] in keys and not alias.keys() - {"parent"}:
            keys.setdefault(name, keys[alias["parent"]])
    return keys
