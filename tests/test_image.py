"""Pictures of every kind that people have arrive upright, RGB and in the right range."""

from __future__ import annotations

import io
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sfumato.errors import FileError, SfumatoError
from sfumato.image import check_size, format_of, grid, read, read_mask, resize, to_array, write, write_atomically

from pictures import drawing


def packed(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def close(a, b, tolerance: float = 0) -> bool:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance


# Reading


@pytest.mark.parametrize("make", [
    lambda picture, folder: picture,
    lambda picture, folder: packed(picture),
    lambda picture, folder: packed(picture, "BMP"),
    lambda picture, folder: packed(picture, "WEBP", lossless=True),
    lambda picture, folder: write(picture, folder / "a.png"),
    lambda picture, folder: str(write(picture, folder / "a.png")),
    lambda picture, folder: np.asarray(picture),
    lambda picture, folder: jnp.asarray(np.asarray(picture)),
    lambda picture, folder: np.asarray(picture, np.float32) / 255,
    lambda picture, folder: np.asarray(picture, np.float64) / 255,
    lambda picture, folder: np.asarray(picture, np.uint16) * 257,
    lambda picture, folder: np.asarray(picture)[::-1][::-1],
    lambda picture, folder: np.asarray(picture.convert("RGBA")),
    lambda picture, folder: picture.convert("RGBA"),
])  # fmt: skip
def test_one_picture_in_every_form_is_the_same(make, tmp_path):
    picture = drawing()
    got = read(make(picture, tmp_path))
    assert got.mode == "RGB"
    assert close(got, picture)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "I;16", "I", "P", "PA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_every_mode_of_pil_becomes_rgb(mode):
    picture = drawing()
    gray = np.asarray(picture.convert("L"))
    if mode in ("I;16", "I"):
        other = Image.fromarray(gray.astype(np.uint16) * 257)
        other = other.convert("I") if mode == "I" else other
    elif mode == "LAB":
        other = Image.merge("LAB", picture.split())
    else:
        other = picture.convert("LA").convert(mode) if mode == "PA" else picture.convert(mode)
    got = read(other)
    assert got.mode == "RGB"
    assert got.size == picture.size
    if mode in ("L", "LA", "I;16", "I"):
        assert close(got, np.stack([gray] * 3, axis=-1))


def test_sixteen_bits_in_files_are_scaled_and_not_cut_off():
    gray = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for source in (packed(Image.fromarray(gray)), packed(Image.fromarray(gray), "TIFF"), gray, gray[..., None]):
        got = np.asarray(read(source))[..., 0]
        assert close(got, gray / 257, 0.51)
    eight = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert close(read(eight.convert("I")), eight.convert("RGB"))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_half_precision_is_a_picture(dtype):
    values = np.asarray(drawing(), np.float32) / 255
    assert close(read(jnp.asarray(values, dtype)), drawing(), 1)


def test_gray_and_boolean_arrays_are_pictures():
    mask = np.zeros((4, 6), bool)
    mask[1, 2] = True
    for array in (mask, mask[..., None], mask.astype(np.float32), mask.astype(np.uint8) * 255):
        assert close(read(array), np.stack([mask * 255] * 3, axis=-1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_upright(orientation):
    turn = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    picture = drawing()
    stored = picture if turn is None else picture.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert close(read(packed(stored, exif=exif)), picture)


def test_transparent_parts_become_white():
    picture = drawing()
    alpha = np.zeros((32, 48), np.uint8)
    alpha[:16], alpha[16:20] = 255, 128
    picture.putalpha(Image.fromarray(alpha))
    got, opaque = np.asarray(read(picture)), np.asarray(drawing())
    assert close(got[:16], opaque[:16])
    assert close(got[20:], np.full((12, 48, 3), 255))
    assert close(got[16:20], opaque[16:20] * (128 / 255) + 255 * (127 / 255), 1)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_of_a_file_becomes_white(mode):
    clear, gray = ((7, 7, 7), (200, 200, 200)) if mode == "RGB" else (7, 200)
    picture = Image.new(mode, (4, 4), clear)
    if mode == "P":
        picture.putpalette([value for value in range(256) for _ in range(3)])
    picture.putpixel((0, 0), gray)
    got = np.asarray(read(packed(picture, transparency=clear)))
    assert (got[1:] == 255).all()
    assert (got[0, 0] == 200).all()


@pytest.mark.parametrize(("source", "message"), [
    ("nothing.png", "nothing.png is not there"),
    (b"", "The picture of 0 bytes is not a picture in a known format"),
    (b"<html>", "of 6 bytes is not a picture in a known format"),
    (packed(drawing())[:300], "cannot be read as a picture"),
    (packed(drawing(200, 200), "JPEG")[:1500], "cannot be read as a picture"),
    (None, "a path, bytes, a PIL picture or an array, not a NoneType"),
    ([[1, 2]], "not a list"),
    (np.zeros((2, 4, 4, 3), np.uint8), r"not of shape \(2, 4, 4, 3\)"),
    (np.zeros((3, 4, 4), np.uint8)[:, :, :2], "not of shape"),
    (np.zeros((0, 4, 3), np.uint8), r"not of shape \(0, 4, 3\)"),
    (np.full((4, 4), np.nan, np.float32), r"values in \[0, 1\], but this has nan to nan"),
    (np.full((4, 4), 1.5), r"values in \[0, 1\], but this has 1.5 to 1.5"),
    (np.full((4, 4, 3), -1.0), r"has -1 to -1"),
    (np.zeros((4, 4), np.int32), "not int32"),
    (np.zeros((4, 4), complex), "not complex128"),
    (np.full((4, 4), "a"), "not <U1"),
    (Image.fromarray(np.zeros((4, 4), np.float32)), "floating-point values without a known range"),
    (Image.fromarray(np.full((4, 4), 10**6, np.int32)), "outside of the 16 bits"),
])  # fmt: skip
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(SfumatoError, match=message) as error:
        read(source)
    assert "\n" not in str(error.value)


def test_a_folder_and_a_huge_picture_are_refused(tmp_path, monkeypatch):
    with pytest.raises(FileError, match="cannot be read as a picture"):
        read(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(FileError, match="would unpack to more than 200 pixels"):
        read(packed(drawing()))


def test_a_picture_as_numbers():
    picture = np.asarray(drawing(), np.float32)
    np.testing.assert_allclose(to_array(drawing()), picture / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(to_array(drawing(), signed=False), picture / 255, atol=1e-6)


# Masks


def test_white_is_one_and_black_or_transparent_is_zero():
    mask = np.zeros((4, 6), np.uint8)
    mask[1, 2], mask[2, 3] = 255, 128
    gray = Image.fromarray(mask)
    stroke = Image.new("RGBA", (6, 4), (255, 255, 255, 0))
    stroke.putalpha(gray)
    for source in (gray, gray.convert("RGB"), mask, mask / 255, stroke):
        soft = read_mask(source, soft=True)
        assert soft.shape == (4, 6, 1)
        np.testing.assert_allclose(soft[..., 0], mask / 255, atol=1e-6)
        np.testing.assert_array_equal(read_mask(source)[..., 0], mask >= 128)
    np.testing.assert_array_equal(read_mask(mask > 0)[..., 0], mask > 0)


# Sizes


@pytest.mark.parametrize("how", ["cover", "contain", "stretch"])
@pytest.mark.parametrize("size", [(48, 32), (24, 24), (100, 20), (20, 100)])
def test_resizing_gives_the_size(how, size):
    got = resize(drawing(), size, how)
    assert got.size == size
    if size == (48, 32):
        assert close(got, drawing())


def test_the_ways_of_resizing():
    half = Image.new("RGB", (40, 20), "red")
    half.paste("blue", (20, 0, 40, 20))
    contain, cover = np.asarray(resize(half, (40, 40), "contain")), np.asarray(resize(half, (40, 40), "cover"))
    assert (contain[:10] == 255).all()
    assert (contain[30:] == 255).all()
    assert close(contain[10:30], half)
    assert (cover[:, 0] == (255, 0, 0)).all()
    assert (cover[:, -1] == (0, 0, 255)).all()
    assert (np.asarray(resize(half.convert("L"), (40, 40), "contain", fill="black"))[:10] == 0).all()


def test_another_way_of_resizing_is_refused():
    with pytest.raises(SfumatoError, match="by cover, contain or stretch, not 'crop'"):
        resize(drawing(), (8, 8), "crop")


@pytest.mark.parametrize(("size", "multiple", "nearest"), [
    ((500, 333), 8, "496x328 and 504x336"),
    ((512, 333), 8, "512x328 and 512x336"),
    ((5, 700), 64, "64x640 and 64x704"),
    ((5, 5), 8, "8x8"),
])  # fmt: skip
def test_a_size_that_does_not_fit_is_refused_with_the_nearest(size, multiple, nearest):
    message = f"The photo has {size[0]}x{size[1]} pixels, .* multiples of {multiple}; the nearest sizes are {nearest}."
    with pytest.raises(SfumatoError, match=message):
        check_size(size, multiple, "The photo")


@pytest.mark.parametrize("size", [
    None, 512, (512,), (1, 2, 3), (0, 8), (-8, 8), (8.5, 8), ("8", "8"), (float("nan"), 8), (float("inf"), 8), "12",
])  # fmt: skip
def test_what_is_no_size_is_refused(size):
    with pytest.raises(SfumatoError, match=r"A size is \(width, height\) in whole pixels"):
        check_size(size)


def test_a_size_that_fits_comes_back_as_integers():
    assert check_size([512.0, np.int64(768)], 8) == (512, 768)


# Grids


@pytest.mark.parametrize(("count", "columns", "size"), [
    (1, None, (1, 1)), (2, None, (2, 1)), (4, None, (2, 2)), (5, None, (3, 2)), (5, 2, (2, 3)), (2, 9, (2, 1)),
])  # fmt: skip
def test_a_grid(count, columns, size):
    pictures = [Image.new("RGB", (6, 4), (10 * n, 0, 0)) for n in range(count)]
    sheet = grid(pictures, columns)
    assert sheet.size == (6 * size[0], 4 * size[1])
    for n in range(count):
        row, column = divmod(n, size[0])
        assert sheet.getpixel((6 * column + 3, 4 * row + 2)) == (10 * n, 0, 0)


def test_an_empty_grid_is_refused():
    with pytest.raises(SfumatoError, match="at least one picture"):
        grid([])
    with pytest.raises(SfumatoError, match="at least one column, not 0"):
        grid([drawing()], 0)


# Writing


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "a.png"
    write(drawing(), path)
    before = path.read_bytes()

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_bytes() == before
    assert [*path.parent.iterdir()] == [path]
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask()


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "folder.png"):
        with pytest.raises(SfumatoError, match="cannot be written"):
            write(drawing(), path)
    assert {each.name for each in tmp_path.iterdir()} == {"file", "folder.png"}


@pytest.mark.parametrize("name", ["a", "a.gif", "a.png.txt"])
def test_an_ending_that_cannot_be_written_is_refused(name, tmp_path):
    with pytest.raises(SfumatoError, match=f"{name} does not end in .png, .jpg, .jpeg, .webp"):
        write(drawing(), tmp_path / name)
    assert format_of(Path("A.JPG")) == "JPEG"
