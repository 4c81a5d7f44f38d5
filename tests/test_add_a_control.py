"""docs/add-a-control.md says what is true: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sfumato
from sfumato import CFG, Window

TEXT = (Path(__file__).parent.parent / "docs" / "add-a-control.md").read_text()


@pytest.fixture(scope="module")
def written(loaded) -> dict[str, Any]:
    """What the code of the page defines."""
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {"model": loaded("sd1")}
    exec(code, names)
    return names


def latents(names: dict[str, Any], *controls: Any) -> np.ndarray:
    made = sfumato.generate(
        names["model"], "a butterfly", controls=[CFG(7.5), *controls], steps=4, size=(32, 16), output="latents"
    )
    return np.asarray(made)


def test_the_page_is_short():
    assert len(TEXT.splitlines()) < 40


def test_its_control_works(written):
    (picture,) = written["images"]
    assert picture.array.std() > 1
    made = latents(written, written["Mirror"](window=Window(0, 1)))
    np.testing.assert_allclose(made, made[:, :, ::-1], atol=1e-6)
    half = latents(written, written["Mirror"](0.5))
    assert 0 < np.abs(half - half[:, :, ::-1]).max() < np.abs(latents(written) - latents(written)[:, :, ::-1]).max()


def test_without_strength_it_is_absent(written):
    np.testing.assert_array_equal(latents(written, written["Mirror"](0.0)), latents(written))


def test_it_refuses_in_one_sentence(written):
    with pytest.raises(sfumato.SfumatoError, match=r"Mirror's strength must lie in \[0, 1\], not be 2\."):
        latents(written, written["Mirror"](2))
