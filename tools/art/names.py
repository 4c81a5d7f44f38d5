"""What there is to draw: the names, groups and keywords that Unicode's tables give each emoji."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterable

from tools.art.packages import Files, load_json

SKIN_TONES = range(0x1F3FB, 0x1F400)
JOINERS = (0x200D, 0xFE0F)
LEFT_OUT = ("flags", "component")
"""Groups that are not drawn: a flag is a drawing that is its own name."""

COMPANIES = ("family", "kiss", "couple with heart")


@dc.dataclass(frozen=True)
class Concept:
    """A thing that the styles draw."""

    key: str
    """Its code points as hexadecimal numbers joined by "-", without joiners: how art finds its name."""
    name: str
    group: str
    keywords: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """The name as a file is called."""
        return slug(self.name)


def slug(text: str) -> str:
    return "-".join(re.findall(r"[^\W_]+", text.lower().replace("'", "")))


def key_of(points: Iterable[int]) -> str:
    return "-".join(f"{point:x}" for point in points if point not in JOINERS)


def key_of_file(name: str) -> str | None:
    """The key of art whose name is its code points, such as "1f98a.webp", or None for other names."""
    parts = name.rpartition("/")[2].partition(".")[0].split("-")
    return (
        key_of(int(part, 16) for part in parts) if all(re.fullmatch("[0-9a-fA-F]+", part) for part in parts) else None
    )


def has_skin_tone(key: str) -> bool:
    return any(int(part, 16) in SKIN_TONES for part in key.split("-"))


def tidy(name: str) -> str:
    """A name of Unicode's as one would say it: "woman: red hair" is "woman with red hair"."""
    name = name.lower().replace("’", "'").replace("…", "").replace("ñ", "n")
    name = re.sub(r"\s*\([^)]*\)|[“”\"!.]", "", name)
    name = re.sub(r"^keycap: ", "keycap ", name)
    head, colon, rest = name.partition(": ")
    if colon:
        *first, last = rest.split(", ")
        joined = f"{', '.join(first)} and {last}" if first else last
        name = f"{head} {'of' if head in COMPANIES else 'with'} {joined}".replace(f"{head} with bald", f"bald {head}")
    return " ".join(name.replace("-", " ").split())


def concepts(unicode: Files, emojibase: Files, emojilib: Files) -> list[Concept]:
    """All concepts in Unicode's order, each name once, with the keywords of both collections."""
    labels = {key_of(map(ord, entry["emoji"])): entry for entry in load_json(emojibase, "en/data.json")}
    more = load_json(emojilib, "dist/emoji-en-US.json")
    found: dict[str, Concept] = {}
    for emoji, entry in load_json(unicode, "data-by-emoji.json").items():
        key, group = key_of(map(ord, emoji)), slug(entry["group"])
        label = labels.get(key, {})
        name = tidy(label.get("label", entry["name"]))
        if group in LEFT_OUT or has_skin_tone(key) or not slug(name):
            continue
        words = [*label.get("tags", []), *more.get(emoji, [])]
        concept = Concept(key, name, group, _keywords(name, words))
        found.setdefault(concept.slug, concept)
    return list(found.values())


def _keywords(name: str, words: Iterable[str]) -> tuple[str, ...]:
    """The words, each once, that say more than the name does."""
    tidied = (" ".join(re.findall(r"[a-z']+", word.lower().replace("_", " "))) for word in words)
    return tuple(dict.fromkeys(word for word in tidied if len(word) > 2 and word not in name))
