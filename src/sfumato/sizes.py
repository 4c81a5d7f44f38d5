"""Sizes as people write them."""

from __future__ import annotations

import re


def parse_size(text: str) -> tuple[int, int] | None:
    """Width and height of a text such as "768x512"; None if it is none."""
    sides = re.fullmatch(r"\s*(\d+)\s*[x×,]\s*(\d+)\s*", text.lower())
    return (int(sides[1]), int(sides[2])) if sides else None
