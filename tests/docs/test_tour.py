"""The notebook runs from its first cell to its last, and what should be a picture is one."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

TOUR = Path(__file__).parents[2] / "docs" / "tour.ipynb"
PICTURES = ("sfumato.generate(", "sfumato.Images(")
"""What the last line of a cell begins with that shows pictures."""


@pytest.mark.slow
def test_the_tour():
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    # In the folder that it lies in, as Jupyter does it.
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(TOUR.parent)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    showing = [cell for cell in cells if cell.source.splitlines()[-1].startswith(PICTURES)]
    assert len(showing) >= 8
    for cell in showing:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
