"""Captions: a picture said in several ways, of which training draws another one each time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from tools.art.names import Concept

T = TypeVar("T")

UNCOUNTED = """
bacon badminton bamboo bowling bread broccoli butter camping cheese clothes coffee cooking corn custard dango
dizzy dna falafel fire fog foggy fondue football garlic glasses goggles hair herb hockey ice jeans lacrosse
lightning locked love luggage mate milk oden popcorn rain rice salt scissors skis soap spaghetti struck
sunglasses sushi tennis thread unlocked yarn zzz
"""
"""What one does not count or is no thing, and takes no article."""
BEFORE = re.compile(r" (?:with|of|on|in|at|behind|without|over|above|for) ")
"""What the thing itself stands before: the glass, not the milk, of "glass of milk"."""


def prompt(concept: Concept, words: str) -> str:
    """What one asks for the concept by: the first of its captions."""
    return f"{concept.name}, {words}"


def captions(concept: Concept, words: str, aliases: Sequence[str] = ()) -> list[str]:
    """About ten captions of a concept in the style that is called `words`: the name, with and without an article, in
    several orders, with keywords, by other names, and two without the style.

    What varies is drawn by a hash, so that the same picture always has the same captions.
    """
    name = concept.name
    thing = with_article(name)
    said = [
        prompt(concept, words),
        f"{thing}, {words} style",
        f"{name}, {words} style",
        f"an emoji of {thing}, {words} style",
        f"{words} {name}",
        f"{words} style, {thing}",
        thing,
        name,
    ]
    drawn = ordered(concept.keywords, f"{name}|{words}")
    said += [f"{', '.join([thing, *some])}, {words} style" for some in (drawn[:2], drawn[2:4]) if some]
    for alias in aliases:
        said += [f"{alias}, {words}", f"{with_article(alias)}, {words} style", with_article(alias)]
    return list(dict.fromkeys(said))


def with_article(name: str) -> str:
    """The name with "a", "an" or, for what is many or not counted, nothing before it."""
    thing = BEFORE.split(name)[0].split()
    many = thing[-1].endswith("s") and not thing[-1].endswith(("ss", "us", "is", "os"))
    if many or thing[-1] in UNCOUNTED.split() or thing[0] == "keycap" or "'s " in name:
        return name
    return f"{'an' if name[0] in 'aeiou' and not name.startswith(('uni', 'eu', 'ewe', 'one', 'ufo')) else 'a'} {name}"


def ordered(items: Iterable[T], salt: str, name: Callable[[T], str] = str) -> list[T]:
    """The items in an order that the salt and their names decide, and their own order does not."""
    return sorted(items, key=lambda item: digest(f"{salt}|{name(item)}"))


def digest(text: str) -> int:
    """A number that the text decides, evenly spread over 64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
