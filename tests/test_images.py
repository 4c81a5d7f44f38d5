"""Results: pictures with their metadata, as a sequence, a grid, files and in notebooks."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from sfumato.errors import SfumatoError
from sfumato.images import Images, Picture
from sfumato.io.picture_metadata import read_metadata

from pictures import drawing


def picture(seed: int) -> Picture:
    return Picture(np.asarray(drawing()) // (seed + 1), {"prompt": "a fox", "settings": {"seed": seed}})


@pytest.fixture
def images():
    return Images([picture(seed) for seed in range(3)])


def test_a_picture_shows_its_parts():
    one = picture(0)
    assert one.size == (48, 32)
    np.testing.assert_array_equal(np.asarray(one.pil), one.array)
    assert "array" not in repr(one)


def test_they_are_a_sequence(images):
    assert len(images) == 3
    assert images[-1].metadata["settings"]["seed"] == 2
    assert isinstance(images[1:], Images)
    assert [each.metadata["settings"]["seed"] for each in images[1:]] == [1, 2]
    assert repr(images[:2]) == "Images(48x32, 48x32)"


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_saved_picture_is_read_with_its_metadata(ending, tmp_path):
    one = picture(5)
    path = one.save(tmp_path / f"a.{ending}")
    assert read_metadata(path) == one.metadata
    back = np.asarray(Image.open(path).convert("RGB"), np.int32)
    assert np.abs(back - one.array).mean() < (0.1 if ending == "png" else 4)
    assert ending != "png" or (back == one.array).all()


def test_a_picture_in_a_notebook_is_a_png():
    shown = Image.open(io.BytesIO(picture(1)._repr_png_()))
    np.testing.assert_array_equal(np.asarray(shown), picture(1).array)
    assert "a fox" in shown.text["parameters"]


def test_the_grid_is_a_picture_that_knows_all_seeds(images, tmp_path):
    sheet = images.grid(columns=3)
    assert sheet.size == (144, 32)
    np.testing.assert_array_equal(sheet.array[:, 48:96], images[1].array)
    assert read_metadata(sheet.save(tmp_path / "grid.png"))["grid"]["seeds"] == [0, 1, 2]
    assert Image.open(io.BytesIO(images._repr_png_())).size == (96, 64)
    assert Images([])._repr_png_() is None


@pytest.mark.parametrize(("pattern", "names"), [
    ("a.png", ["a-0.png", "a-1.png", "a-2.png"]),
    ("{index:03}.jpg", ["000.jpg", "001.jpg", "002.jpg"]),
    ("fox-{seed}.webp", ["fox-0.webp", "fox-1.webp", "fox-2.webp"]),
    ("{seed}/x.png", ["0/x.png", "1/x.png", "2/x.png"]),
])  # fmt: skip
def test_all_are_saved_by_a_pattern(images, pattern, names, tmp_path):
    assert images.save(tmp_path / pattern) == [tmp_path / name for name in names]
    for each, name in zip(images, names, strict=True):
        assert read_metadata(tmp_path / name) == each.metadata


def test_a_single_one_keeps_the_name(images, tmp_path):
    assert images[:1].save(tmp_path / "a.png") == [tmp_path / "a.png"]


@pytest.mark.parametrize(("pattern", "message"), [
    ("{name}.png", "may hold {index} and {seed}"),
    ("{}.png", "may hold"),
    ("{index.png", "may hold"),
    ("{index:q}.png", "may hold"),
    ("{seed!r:2}{index.x}.png", "may hold"),
    ("{seed:.0}.gif", "may hold"),
    ("{{a}}.png", "gives several pictures the same name"),
    ("{index}.gif", "does not end in .png"),
])  # fmt: skip
def test_a_pattern_that_cannot_be_is_refused_before_anything_is_written(images, pattern, message, tmp_path):
    with pytest.raises(SfumatoError, match=message):
        images.save(tmp_path / pattern)
    assert not [*tmp_path.iterdir()]
