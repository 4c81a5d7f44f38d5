"""The art in other colours, and two things side by side."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sfumato.annotators.regions import PALETTE
from sfumato.train.data import examples
from tools.art.recolour import COLOURS, colour_of, recoloured
from tools.art.vary import vary


def apple(colour: str) -> np.ndarray:
    """A disc with a gleam and a green leaf, on white."""
    picture = Image.new("RGB", (128, 128), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((16, 30, 112, 122), fill=colour)
    pen.ellipse((30, 44, 46, 60), fill="white")
    pen.ellipse((62, 8, 90, 26), fill="#3caa3c")
    return np.array(picture)


@pytest.mark.parametrize("colour", COLOURS)
def test_every_colour_is_told_and_can_be_given(colour):
    assert colour_of(apple(PALETTE[colour])) == colour
    assert colour_of(recoloured(apple("#dc2828"), colour)) == colour


@pytest.mark.parametrize(("paint", "name"), [("#3b88c3", "blue"), ("#82502a", None), ("#a0a4a8", None)])
def test_light_blue_is_blue_and_brown_and_grey_are_no_colours(paint, name):
    assert colour_of(apple(paint)) == name


def test_only_what_has_the_things_colour_is_changed():
    before = apple("#dc2828")
    after = recoloured(before, "blue")
    leaf, gleam, ground = (slice(12, 22), slice(70, 82)), (slice(48, 56), slice(34, 42)), (slice(0, 6), slice(0, 128))
    for place in (leaf, gleam, ground):
        np.testing.assert_allclose(after[place].astype(int), before[place], atol=2)
    red, green, blue = after[80, 64]
    assert blue > 180
    assert blue > 1.5 * max(red, green)


def test_what_has_no_colour_cannot_be_given_one():
    assert recoloured(np.full((8, 8, 3), 128, np.uint8), "red") is None
    assert recoloured(np.full((8, 8, 3), 255, np.uint8), "red") is None


@pytest.fixture
def art(tmp_path):
    """Three things in two styles; the ball is grey."""
    folder, lines = tmp_path / "art", []
    folder.mkdir()
    for style in ("noto", "twemoji"):
        for name, paint in (("red apple", "#dc2828"), ("fox", "#ff8c00"), ("ball", "#a0a4a8")):
            file = f"{style}-{name}.png"
            picture = Image.new("RGB", (128, 128), paint) if name == "ball" else Image.fromarray(apple(paint))
            picture.save(folder / file)
            lines.append({"file_name": file, "text": [f"{name}, {style}"], "concept": name, "style": style})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_the_folder_has_what_its_captions_say(art, tmp_path):
    lines = vary(art, tmp_path / "out", colours=2, count=8)
    singles, pairs = lines[:14], lines[14:]
    assert len(pairs) == 8
    said = [line["text"][0] for line in singles]
    assert said[:3] == ["red apple, noto", *said[1:3]]
    assert {"fox, noto", "ball, noto", "fox, twemoji"} <= set(said)
    apples = [line for line in singles if line["concept"] == "apple"]
    assert len(apples) == 6, "as it came and in two more colours, in two styles; its colour is no part of its name"
    for line in singles:
        picture = np.array(Image.open(tmp_path / "out" / line["file_name"]))
        assert colour_of(picture) == line["colour"]
        if line["colour"]:
            assert any(f"{line['colour']} {line['concept']}" in text for text in line["text"])
    for line in pairs:
        one, other = line["concept"].split(" and ")
        assert one != other
        assert all(one in text and other in text for text in line["text"])
        assert any(text.endswith(f"on the right, {line['style']} style") for text in line["text"])
    assert len(examples(tmp_path / "out")) == len(lines)


def test_it_is_the_same_every_time(art, tmp_path):
    made = [vary(art, tmp_path / name, colours=3, count=5) for name in ("one", "other")]
    assert made[0] == made[1]


def test_of_one_thing_there_are_no_pairs(art, tmp_path):
    lines = [line for line in (art / "metadata.jsonl").read_text().splitlines() if "fox" in line]
    (art / "metadata.jsonl").write_text("\n".join(lines))
    assert len(vary(art, tmp_path / "out", colours=1, count=5)) == 4


def test_further_pictures_come_along_as_they_are(art, tmp_path):
    more = tmp_path / "more"
    more.mkdir()
    Image.fromarray(apple("#ff8c00")).save(more / "a.webp", lossless=True)
    lines = [{"file_name": "a.webp", "text": ["pear, noto"], "concept": "pear", "style": "noto"},
             {"file_name": "a.webp", "text": ["fox, noto"], "concept": "fox", "style": "noto"}]  # fmt: skip
    (more / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    made = vary(art, tmp_path / "out", colours=0, count=0, also=more)
    assert [line["text"][0] for line in made[6:]] == ["pear, noto"], "and not what is there already"
    assert (tmp_path / "out" / made[-1]["file_name"]).read_bytes() == (more / "a.webp").read_bytes()
