"""Files that other programs made, which are read as a user's are. They are not ours to give away."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("SFUMATO_REAL_FILES", Path(__file__).parents[2] / "shared" / "real"))


def real_file(name: str) -> Path:
    """One of them; without it the test is skipped and says so."""
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"there is no {path}, a file that is no part of the project (CONTRIBUTING.md)")
    return path
