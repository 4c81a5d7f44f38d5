"""The gallery's page is that of its entries, and every picture is there."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tools.gallery.__main__ import PAGE, page, run
from tools.gallery.drawings import SKETCHES, cat, draw
from tools.gallery.entries import ENTRIES, SECTIONS, Entry

GALLERY = Path(__file__).parents[2] / "docs" / "gallery"


def test_the_page_is_that_of_the_entries():
    assert (GALLERY / PAGE).read_text(encoding="utf-8") == page()
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    for entry in ENTRIES:
        assert entry.section in SECTIONS
        assert entry.file in entry.code
        assert Image.open(GALLERY / entry.file).width >= 128


def test_the_drawings_are_those_of_the_gallery(tmp_path):
    draw(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        *(f"sketch-{name}.jpg" for name in SKETCHES),
        "painted-cat.png",
    }
    assert Image.open(GALLERY / "painted-cat.png").tobytes() == cat().tobytes()


def test_an_entry_that_writes_nothing_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"did not write nothing\.png"):
        run(Entry("nothing", "Text", "Nothing", "x = 1"), {})
