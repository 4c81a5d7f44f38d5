"""Every annotator makes an RGB picture of the same size, and says what it takes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.annotators import NAMES, Annotator, Option, Range
from sfumato.errors import FileError, SfumatoError
from sfumato.image import write

from pictures import drawing


@pytest.mark.parametrize("name", NAMES)
def test_every_annotator(name, tmp_path):
    annotator = sfumato.annotators()[name]
    assert isinstance(annotator, Annotator)
    assert annotator.name == name
    assert 10 < len(annotator.description) < 90
    for option in annotator.options.values():
        assert option.check(option.default, name) == option.default
        assert option.wanted()
    picture = drawing()
    made = sfumato.annotate(name, picture)
    assert (made.mode, made.size) == ("RGB", picture.size)
    for source in (np.asarray(picture), write(picture, tmp_path / "a.png")):
        assert made.tobytes() == sfumato.annotate(name, source).tobytes()
    plain = sfumato.annotate(name, picture, **{key: option.default for key, option in annotator.options.items()})
    assert made.tobytes() == plain.tobytes()


@pytest.mark.parametrize(("name", "options", "message"), [
    ("cany", {}, "There is no annotator 'cany'; did you mean canny?"),
    ("hed", {}, "There is no annotator 'hed'; there is canny, scribble, sketch, regions, grayscale"),
    ("canny", {"hight": 3}, "The annotator canny has no option 'hight'; did you mean high?"),
    ("grayscale", {"low": 3}, "The annotator grayscale has no option 'low'; it has none"),
    ("canny", {"low": 1.5}, "canny: low is a whole number from 0 to 2040, not 1.5"),
    ("canny", {"low": True}, "not True"),
    ("canny", {"low": None}, "not None"),
    ("canny", {"low": "many"}, "not 'many'"),
    ("canny", {"low": -1}, "not -1"),
    ("canny", {"high": 5000}, "not 5000"),
    ("canny", {"blur": float("nan")}, "canny: blur is a number from 0 to 100, not nan"),
    ("canny", {"low": 300}, "low=300 is above high=200"),
])  # fmt: skip
def test_what_does_not_exist_is_refused(name, options, message):
    with pytest.raises(SfumatoError) as error:
        sfumato.annotate(name, drawing(), **options)
    assert message in str(error.value)


def test_a_picture_that_is_none_is_refused():
    with pytest.raises(FileError, match=r"nothing\.png is not there"):
        sfumato.annotate("canny", "nothing.png")


@pytest.mark.parametrize(("option", "values"), [
    (Option("a", int, 1, Range(0, 9)), {3: 3, "4": 4, 5.0: 5, np.int64(6): 6, np.float32(7): 7}),
    (Option("a", float, 1.0), {3: 3.0, "4.5": 4.5, "-1e3": -1000.0, np.float32(0.5): 0.5}),
    (Option("a", bool, False), {True: True, "false": False, "Yes": True, "0": False}),
    (Option("a", str, "x", choices=("x", "y")), {"y": "y"}),
    (Option("a", str, "x"), {"": "", "text": "text"}),
])  # fmt: skip
def test_values_come_as_numbers_or_text(option, values):
    for given, expected in values.items():
        got = option.check(given, "here")
        assert got == expected
        assert type(got) is option.kind


@pytest.mark.parametrize(("option", "value", "wanted"), [
    (Option("a", int, 1), "1.5", "a whole number"),
    (Option("a", int, 1), float("inf"), "a whole number"),
    (Option("a", float, 1.0), "inf", "a number"),
    (Option("a", float, 1.0, Range(low=0)), -0.1, "a number from 0 on"),
    (Option("a", bool, True), "maybe", "true or false"),
    (Option("a", str, "x", choices=("x", "y")), "z", "one of x, y"),
    (Option("a", str, "x"), 3, "a text"),
])  # fmt: skip
def test_values_that_do_not_fit_are_refused(option, value, wanted):
    with pytest.raises(SfumatoError, match=f"here: a is {wanted}, not "):
        option.check(value, "here")


def test_listing_them_and_graying_load_no_opencv():
    program = (
        "import sys, sfumato; sfumato.annotators(); from PIL import Image\n"
        "sfumato.annotate('grayscale', Image.new('RGB', (2, 2))); assert 'cv2' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_public_names_survive_imports_of_modules_with_the_same_name():
    import sfumato.annotators.canny
    from sfumato.annotators import annotators

    assert sfumato.annotators is annotators
    assert isinstance(sfumato.annotate("grayscale", drawing()), Image.Image)
