"""The measures of the embedded model's quality."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from benchmarks.quality import measures
from benchmarks.quality.art import Art, read
from benchmarks.quality.features import Space, cropped
from sfumato import CFG

SHAPES = {"box": "rectangle", "disc": "ellipse"}


def shape(name, colour, at=30, size=50):
    picture = Image.new("RGB", (128, 128), "white")
    getattr(ImageDraw.Draw(picture), SHAPES[name])((at, at, at + size, at + size), fill=colour)
    return np.asarray(picture)


def test_the_nearest_is_found_wherever_it_lies_and_however_large_it_is():
    known = [(name, colour) for name in SHAPES for colour in ("red", "blue")]
    space = Space(np.stack([shape(*one) for one in known]), [" ".join(one) for one in known])
    moved = np.stack([shape(*one, at=12, size=90) for one in known])
    assert space.nearest(moved) == [" ".join(one) for one in known]


def test_a_white_picture_has_features_too():
    assert (cropped(np.full((64, 64, 3), 255, np.uint8)) == 255).all()


def test_edges():
    box, near, far = (measures.edges(Image.fromarray(shape("box", "red", at=at))) for at in (30, 31, 60))
    assert measures.edge_f1(box, box) == 1
    assert measures.edge_f1(box, near) > 0.9
    assert measures.edge_f1(box, far) < 0.3
    assert measures.edge_f1(box, np.zeros_like(box)) == 0


def test_figures_of_pictures():
    picture = shape("disc", "red")
    assert measures.grey_psnr(picture, picture) == 100
    assert measures.grey_psnr(np.zeros_like(picture), np.full_like(picture, 255)) == pytest.approx(0, abs=1e-6)
    assert measures.region_iou(picture, picture) == pytest.approx(1)
    assert measures.region_iou(picture, np.zeros_like(picture)) == 0


def test_pairs_are_those_that_were_held_out_as_pairs(tmp_path):
    lines = []
    for number, why in enumerate(["pair", "concept", "pair"]):
        Image.fromarray(shape("box", "red", at=number)).save(tmp_path / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": [f"box {number}, plain", "a box"], "concept": "box",
                      "style": "plain", "why": why})  # fmt: skip
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    art = read(tmp_path)
    assert art.pairs().prompts == ["box 0, plain", "box 2, plain"]
    assert sorted(art.take(2).prompts) == sorted(art.take(2).prompts)
    assert len(art.take(9)) == 3


def test_a_negative_prompt_takes_the_colour(monkeypatch):
    """Of a model that draws things in their colour, unless that is the negative prompt; grey ones are not asked for."""
    paints = {"box": "#dc2828", "disc": "#285ad2", "grey box": "#a0a4a8"}
    known = np.stack([shape(name.split()[-1], paint) for name, paint in paints.items()])
    asked = Art(known, [{"concept": name, "text": [f"{name}, plain"]} for name in paints])

    def draw(model, prompts, negative=None, **settings):
        assert prompts == ["box, plain", "disc, plain"]
        assert negative in (None, ["red box", "blue disc"])
        return known[:2] if negative is None else known[1::-1]

    monkeypatch.setattr(measures, "draw", draw)
    assert list(measures.negative(None, asked).values()) == [1, 0]


def test_the_seam_of_what_is_inpainted(monkeypatch):
    """Of a model that continues a picture rightly if it may see it, and draws something else if not."""
    asked = Art(np.stack([shape("disc", "red")]), [{"concept": "disc", "text": ["disc, plain"]}])

    def draw(model, prompts, steer=None, **settings):
        assert steer is None or type(steer([0])[1]).__name__ == "Inpaint"
        return asked.pictures if steer else np.zeros_like(asked.pictures)

    monkeypatch.setattr(measures, "draw", draw)
    monkeypatch.setattr(measures, "rebuilt", lambda model, pictures: np.full_like(pictures, 200))
    real, decoded, apart = measures.inpainting(None, asked, CFG(3.0)).values()
    assert real == 1
    assert 1 < decoded < apart
    assert apart > 5
