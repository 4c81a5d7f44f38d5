"""The folder: pictures, masks and maps of regions, and the files that list them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tools.art.captions import captions
from tools.art.draw import draw, mask, on_white
from tools.art.heldout import HeldOut
from tools.art.licences import licences
from tools.art.metadata import METADATA, enlist
from tools.art.names import Concept, concepts
from tools.art.regions import regions
from tools.art.styles import STYLES, art_of

KINDS = ("pictures", "masks", "regions")


def known(open_package: Callable[[str], Any]) -> list[Concept]:
    """All concepts; `open_package` gives the files of a package by its name."""
    return concepts(*map(open_package, ("unicode-emoji-json", "emojibase-data", "emojilib")))


def select(concepts: Sequence[Concept], names: Collection[str], groups: Collection[str]) -> list[Concept]:
    """The concepts of these names or groups. Raises ValueError for a name or group that there is not."""
    unknown = set(names) - {one.name for one in concepts} | set(groups) - {one.group for one in concepts}
    if unknown:
        raise ValueError(f"There is no concept or group {', '.join(sorted(unknown))}.")
    return [one for one in concepts if one.name in names or one.group in groups]


def build(
    out: Path,
    open_package: Callable[[str], Any],
    chosen: Sequence[Concept],
    styles: Sequence[str],
    held: HeldOut,
    *,
    aliases: dict[str, tuple[str, ...]] | None = None,
    size: int = 128,
    limit: int | None = None,
) -> collections.Counter[tuple[str, str]]:
    """Writes the folder `out` and returns how many pictures of a style it has, by (style, "train" or "held out").

    A picture is pictures/STYLE/NAME.webp; its mask and its regions are called alike, below masks and regions. What is
    held out lies in the folder heldout, which is laid out as `out` itself is, so that no list of what is trained on
    can come upon it. `limit` is how many pictures a style has at most.
    """
    lists: dict[str, list[dict[str, Any]]] = {"train": [], "held out": []}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    # "tiger" is the tiger's face where there is no concept of that name.
    names = {concept.name for concept in chosen}
    others = {name: [one for one in also if one not in names] for name, also in (aliases or {}).items()}
    for style in styles:
        for concept, pictures in _pictures(style, open_package, chosen, size, limit):
            why = held.why(concept.name, style)
            part = "held out" if why else "train"
            paths = _write(out / "heldout" if why else out, style, concept.slug, pictures)
            entry = _entry(paths, concept, style, others.get(concept.name, ()))
            lists[part].append(entry | ({"why": why} if why else {}))
            counts[style, part] += 1
    enlist(out / METADATA, lists["train"])
    if lists["held out"]:
        enlist(out / "heldout" / METADATA, lists["held out"])
    enlist(out / "heldout.jsonl", [_below("heldout", entry) for entry in lists["held out"]])
    (out / "LICENSES.md").write_text(licences(styles), "utf-8")
    return counts


def _pictures(
    style: str, open_package: Callable[[str], Any], chosen: Iterable[Concept], size: int, limit: int | None
) -> Iterator[tuple[Concept, tuple[Image.Image, ...]]]:
    """The concepts that a style draws with their picture, mask and regions; of equal pictures only the first."""
    drawings, twin = art_of(STYLES[style], open_package), STYLES[style].twin
    twins = art_of(STYLES[twin], open_package) if twin else None
    seen: set[bytes] = set()
    for concept in chosen:
        read = drawings.find(concept)
        if read is None or (limit is not None and len(seen) >= limit):
            continue
        art = read()
        drawn = draw(art, size)
        pixels = drawn.tobytes()
        if pixels not in seen:
            seen.add(pixels)
            other = twins.find(concept) if twins else None
            yield concept, (on_white(drawn), mask(drawn), regions(art, drawn, other() if other else None))


def _write(folder: Path, style: str, name: str, pictures: tuple[Image.Image, ...]) -> dict[str, str]:
    """Writes a picture, its mask and its regions; returns their paths in the folder by what they are."""
    paths = {}
    for kind, picture in zip(KINDS, pictures, strict=True):
        path = f"{kind}/{style}/{name}.{'webp' if kind == 'pictures' else 'png'}"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path, **({"lossless": True, "method": 4} if kind == "pictures" else {}))
        paths[kind] = path
    return paths


def _entry(paths: dict[str, str], concept: Concept, style: str, aliases: Sequence[str]) -> dict[str, Any]:
    """A line of metadata.jsonl. Its columns "mask" and "regions" can be what a ControlNet is steered by."""
    return {
        "file_name": paths["pictures"],
        "text": captions(concept, STYLES[style].words, aliases),
        "concept": concept.name,
        "style": style,
        "group": concept.group,
        "keywords": list(concept.keywords),
        "mask": paths["masks"],
        "regions": paths["regions"],
    }


def _below(folder: str, entry: dict[str, Any]) -> dict[str, Any]:
    return entry | {key: f"{folder}/{entry[key]}" for key in ("file_name", "mask", "regions")}
