"""What no model may be trained on: pairs of a concept and a style, and concepts in all styles.

The choice is a file of the repository, heldout.json. It was made by `choose` and stays as it is, whatever a later
version of the packages has, so that figures of one model can be compared with those of the next.
"""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from tools.art.captions import digest
from tools.art.names import Concept
from tools.art.styles import STYLES

HERE = Path(__file__).parent
NOUN_STYLES = ("noto", "twemoji", "fluent-3d")
"""The styles of the small model, among which the pairs of its nouns are."""
OTHER_GROUPS = ("animals-nature", "food-drink", "travel-places", "activities", "objects", "smileys-emotion")
"""The groups of the other pairs and of the concepts: no signs, and no people, who are one another's doubles."""


@dc.dataclass(frozen=True)
class HeldOut:
    """What is held out."""

    pairs: dict[str, str]
    """The style that is held out of a concept: one of each concept at most."""
    concepts: frozenset[str] = frozenset()

    def why(self, concept: str, style: str) -> str | None:
        """Why the pair is held out: as a "pair", as the "twin" of one, for its "concept"; None if it is not."""
        if concept in self.concepts:
            return "concept"
        held = self.pairs.get(concept)
        if held is None:
            return None
        if held == style:
            return "pair"
        return "twin" if STYLES[held].twin == style or STYLES[style].twin == held else None


def read(path: Path = HERE / "heldout.json") -> HeldOut:
    found = json.loads(path.read_text("utf-8"))
    return HeldOut(found["pairs"], frozenset(found["concepts"]))


def write(held: HeldOut, path: Path = HERE / "heldout.json") -> None:
    found = {"pairs": dict(sorted(held.pairs.items())), "concepts": sorted(held.concepts)}
    path.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def nouns(path: Path = HERE / "nouns.txt") -> dict[str, tuple[str, ...]]:
    """The names that a file lists, a line for each, and what else one would call them."""
    found: dict[str, tuple[str, ...]] = {}
    for line in path.read_text("utf-8").splitlines():
        name, _, others = line.partition("#")[0].partition("=")
        if name.strip():
            found[name.strip()] = tuple(other.strip() for other in others.split(",") if other.strip())
    return found


def choose(
    concepts: Sequence[Concept],
    arts: dict[str, Any],
    first: Collection[str],
    *,
    noun_pairs: int = 100,
    other_pairs: int = 100,
    whole: int = 40,
) -> HeldOut:
    """A choice by hashes of names, which the order of the concepts and what else there is hardly change.

    `arts` are the styles' drawings; `first` are the names of the nouns. `noun_pairs` of these are held out in one of
    `NOUN_STYLES`, `other_pairs` of the other concepts in any style, and `whole` concepts in all styles.
    """

    def drawn(concept: Concept, styles: Iterable[str]) -> list[str]:
        return [style for style in styles if style in arts and arts[style].find(concept)]

    def least(count: int, kind: str, among: Iterable[Concept], fits: Callable[[Concept], bool]) -> list[Concept]:
        return sorted(filter(fits, among), key=lambda concept: digest(f"{kind}|{concept.name}"))[:count]

    def style_of(concept: Concept, styles: Iterable[str]) -> str:
        return min(drawn(concept, styles), key=lambda style: digest(f"{concept.name}|{style}"))

    seen_elsewhere = lambda styles: lambda concept: len(drawn(concept, styles)) >= 3  # noqa: E731
    others = [concept for concept in concepts if concept.name not in first and concept.group in OTHER_GROUPS]
    gone = least(whole, "concept", others, seen_elsewhere(arts))
    left = [concept for concept in others if concept not in gone]
    known = [concept for concept in concepts if concept.name in first]
    pairs = {
        concept.name: style_of(concept, NOUN_STYLES)
        for concept in least(noun_pairs, "pair", known, seen_elsewhere(NOUN_STYLES))
    }
    pairs |= {
        concept.name: style_of(concept, arts) for concept in least(other_pairs, "pair", left, seen_elsewhere(arts))
    }
    return HeldOut(pairs, frozenset(concept.name for concept in gone))
