from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sfumato.image import read
from sfumato.train.prepare import cut, upright_size

from pictures import drawing


@pytest.mark.parametrize("picture", [(48, 32), (32, 48), (100, 33), (24, 24), (7, 90)])
@pytest.mark.parametrize("size", [(24, 24), (40, 16), (64, 128)])
def test_the_cut_lies_within_the_picture(picture, size):
    for draws in np.random.default_rng(0).random((20, 4), np.float32):
        part = cut(picture, size, draws, flip=True, crop=True)
        assert 0 <= part.left <= part.resized[0] - size[0]
        assert 0 <= part.top <= part.resized[1] - size[1]
        assert 0 in (part.resized[0] - size[0], part.resized[1] - size[1])
        assert part.apply(drawing(*picture)).size == size


def test_every_place_is_drawn():
    draws = np.random.default_rng(0).random((400, 4), np.float32)
    lefts = {cut((40, 32), (32, 32), one, flip=False, crop=True).left for one in draws}
    assert lefts == set(range(9))
    assert {cut((40, 32), (32, 32), one, flip=False, crop=False).left for one in draws} == {4}


def test_zoom_enlarges_by_every_factor_up_to_it():
    draws = np.random.default_rng(0).random((400, 4), np.float32)
    parts = [cut((64, 64), (32, 32), one, flip=False, crop=True, zoom=2) for one in draws]
    assert {part.resized[0] for part in parts} == set(range(32, 65))
    assert all(0 <= part.left <= part.resized[0] - 32 for part in parts)


def test_equals_resizing_mirroring_and_cropping_one_after_another():
    """The picture is resampled once; the long way round gives the same."""
    picture = drawing(97, 64)
    for draws in np.random.default_rng(1).random((8, 4), np.float32):
        part = cut(picture.size, (32, 32), draws, flip=True, crop=True)
        whole = picture.resize(part.resized, Image.Resampling.LANCZOS)
        if part.flip:
            whole = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        expected = whole.crop((part.left, part.top, part.left + 32, part.top + 32))
        difference = np.abs(np.asarray(expected, int) - np.asarray(part.apply(picture), int))
        assert difference[2:-2, 2:-2].max() <= 2


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    drawing(48, 32).save(path, exif=exif)
    expected = (32, 48) if orientation > 4 else (48, 32)
    assert upright_size(path, "a") == expected
    assert read(path).size == expected
    assert upright_size(path.read_bytes(), "a") == expected
