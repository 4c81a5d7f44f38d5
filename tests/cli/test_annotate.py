"""`sfumato annotate` and `sfumato annotators` as processes of their own."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import sfumato
from cli.test_cli import run

from pictures import drawing


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    drawing().save(path)
    return path


def test_it_writes_what_the_function_makes(photo, tmp_path):
    out = tmp_path / "new" / "edges.png"
    done = run("annotate", "canny", str(photo), "-o", str(out), "--set", "low=20", "-s", "high=60", "--set", "blur=0.5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    expected = sfumato.annotate("canny", photo, low=20, high=60, blur=0.5)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.asarray(expected))


@pytest.mark.parametrize(("arguments", "message"), [
    (["cany", "photo.png", "-o", "out.png"], "There is no annotator 'cany'; did you mean canny?"),
    (["canny", "none.png", "-o", "out.png"], "none.png is not there."),
    (["canny", "photo.png", "-o", "out.gif"], "out.gif does not end in .png"),
    (["canny", "photo.png", "-o", "out.png", "--set", "low"], "--set takes OPTION=VALUE, such as low=50, not 'low'."),
    (["canny", "photo.png", "-o", "out.png", "--set", "low=x"], "low is a whole number from 0 to 2040, not 'x'."),
])  # fmt: skip
def test_a_mistake_is_one_sentence_and_nothing_is_written(photo, arguments, message):
    done = run(
        "annotate", *(str(photo.parent / part) if part.endswith((".png", ".gif")) else part for part in arguments)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("sfumato: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert [*photo.parent.iterdir()] == [photo]


def test_the_annotators_are_listed():
    lines = run("annotators").stdout.splitlines()
    assert any(line.startswith("canny ") and line.endswith("Thin edges, white on black.") for line in lines)
    assert any("low=100" in line for line in lines)
    listed = json.loads(run("annotators", "--json").stdout)
    assert listed.keys() == sfumato.annotators().keys()
    assert listed["canny"]["options"]["high"] == {
        "kind": "int", "default": 200, "takes": "a whole number from 0 to 2040",
    }  # fmt: skip
