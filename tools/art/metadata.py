"""metadata.jsonl: what a folder says of its pictures, a line each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

METADATA = "metadata.jsonl"


def listed(folder: Path) -> list[dict[str, Any]]:
    """What is said of the pictures of a folder."""
    return [json.loads(line) for line in (folder / METADATA).read_text("utf-8").splitlines()]


def enlist(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes such a file."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
