"""What a picture's file says about how it was made: ours comes back as it was, and that of others is understood."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.errors import FileError, SfumatoError
from sfumato.image import write
from sfumato.io.picture_metadata import from_parameters, read_metadata, save_options, to_json, to_parameters

from pictures import drawing

OURS = {
    "prompt": 'a "red" fox, (sharp:1.2)\nin Øre — 雪 🦊',
    "negative": "blurry,\nlow quality",
    "settings": {
        "steps": 30, "sampler": "dpm++2m", "guidance": 7.5, "seed": 2**62 + 1, "size": [512, 768], "strength": 0.6,
        "clip_skip": 1,
    },
    "model": "folder, with: signs",
    "controls": [{"name": "ControlNet", "scale": 0.8, "window": [0.0, 0.6]}],
    "versions": {"sfumato": "0.1", "jax": "0.10.2"},
}  # fmt: skip
LINE = (
    'Steps: 30, Sampler: dpm++2m, CFG scale: 7.5, Seed: 4611686018427387905, Size: 512x768, Denoising strength: 0.6, '
    'Clip skip: 2, Model: "folder, with: signs", Version: sfumato 0.1'
)  # fmt: skip


def saved(metadata, path):
    kind = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}[path.suffix]
    return write(drawing(), path, **save_options(metadata, kind))


def png(path, **texts):
    chunks = PngInfo()
    for key, text in texts.items():
        chunks.add_text(key, text)
    drawing().save(path, pnginfo=chunks)
    return path


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("metadata", [OURS, {}, {"prompt": "nul \0, \ud83d lone"}, {"prompt": "a\n" * 500}])
def test_what_was_written_comes_back(ending, metadata, tmp_path):
    path = saved(metadata, tmp_path / f"a.{ending}")
    assert read_metadata(path) == metadata
    assert Image.open(path).size == drawing().size


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_others_find_the_parameters_where_they_look(ending, tmp_path):
    picture = Image.open(saved(OURS, tmp_path / f"a.{ending}"))
    if ending == "png":
        text = picture.text["parameters"]
    else:
        comment = picture.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0"
        text = comment[8:].decode("utf-16-be")
    assert text == f"{OURS['prompt']}\nNegative prompt: {OURS['negative']}\n{LINE}"


def test_our_parameters_are_understood_by_ourselves():
    assert from_parameters(to_parameters(OURS)) == {
        "prompt": OURS["prompt"], "negative": OURS["negative"], "model": OURS["model"],
        "settings": OURS["settings"] | {"Version": "sfumato 0.1"},
    }  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), [
    ("", {"prompt": "", "negative": "", "settings": {}}),
    ("a fox", {"prompt": "a fox", "negative": "", "settings": {}}),
    ("a fox, size: large, mood: calm", {"prompt": "a fox, size: large, mood: calm", "negative": "", "settings": {}}),
    ("a fox\nNegative prompt: bad", {"prompt": "a fox", "negative": "bad", "settings": {}}),
    ("Negative prompt: bad\nSteps: 1, Seed: 2, Size: 8x8",
     {"prompt": "", "negative": "bad", "settings": {"steps": 1, "seed": 2, "size": [8, 8]}}),
    ('a fox\nSteps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 5, Size: 512x512, Model hash: 6ce0161689, '
     'Model: v1-5-pruned, Lora hashes: "a: 12, b: \\"34\\"", Version: v1.6.0',
     {"prompt": "a fox", "negative": "", "model": "v1-5-pruned", "settings": {
         "steps": 20, "sampler": "DPM++ 2M Karras", "guidance": 7.0, "seed": 5, "size": [512, 512],
         "Model hash": "6ce0161689", "Lora hashes": 'a: 12, b: "34"', "Version": "v1.6.0"}}),
    ("a\nSteps: many, Seed: -1, Size: big, CFG scale: 7",
     {"prompt": "a", "negative": "",
      "settings": {"Steps": "many", "seed": -1, "Size": "big", "guidance": 7.0}}),
])  # fmt: skip
def test_parameters_of_others(text, expected, tmp_path):
    assert from_parameters(text) == expected
    if text:
        assert read_metadata(png(tmp_path / "a.png", parameters=text)) == expected


@pytest.mark.parametrize("line", ["a " * 30000, " " * 60000, 'a:"' * 20000, 'a:"\\' * 10000, "a: " * 16000])
def test_a_strange_line_takes_no_long_time(line):
    assert from_parameters(f"a fox\n{line}")["prompt"].startswith("a fox")


def test_values_of_arrays_are_written_as_numbers():
    import jax.numpy as jnp

    value = {"a": np.float32(0.5), "b": np.int64(3), "c": jnp.asarray([0.25]), "d": jnp.asarray(0.5, jnp.bfloat16)}
    assert json.loads(to_json(value)) == {"a": 0.5, "b": 3, "c": [0.25], "d": 0.5}
    assert "CFG scale: 7.5," in to_parameters(json.loads(to_json({"settings": {"guidance": np.float32(7.5)}})))
    with pytest.raises(SfumatoError, match="cannot hold a object"):
        to_json({"a": object()})


def test_pictures_that_say_nothing_or_nonsense(tmp_path):
    drawing().save(tmp_path / "a.png")
    drawing().save(tmp_path / "a.jpg")
    assert read_metadata(tmp_path / "a.png") == {}
    assert read_metadata(tmp_path / "a.jpg") == {}
    for text in ("{", "[1]", "[" * 100_000):
        assert read_metadata(png(tmp_path / "b.png", sfumato=text)) == {}
        found = read_metadata(png(tmp_path / "b.png", sfumato=text, parameters="a fox"))
        assert found["prompt"] == "a fox"


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("<html>")
    for path, message in ((tmp_path / "a.png", "cannot be read as a picture."), (tmp_path / "b.png", "is not there.")):
        with pytest.raises(FileError, match=f"{path.name} {message}"):
            read_metadata(path)


def test_more_than_a_jpeg_takes_is_refused(tmp_path):
    long = {"prompt": "fox " * 20000}
    assert read_metadata(saved(long, tmp_path / "a.png")) == long
    with pytest.raises(SfumatoError, match="a JPEG file takes 65533; a PNG takes all"):
        saved(long, tmp_path / "a.jpg")
    assert not (tmp_path / "a.jpg").exists()
