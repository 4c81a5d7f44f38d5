"""The drawings that the gallery starts from, so that they are ours: sketches on paper, and a painted cat."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 512
Line = Sequence[tuple[float, float]]
"""Points of a stroke, in hundredths of the side."""


def arc(x: float, y: float, wide: float, high: float, start: float = 0, stop: float = 360, count: int = 40) -> Line:
    """Points of an ellipse around (x, y), from an angle to another in degrees, 0 to the right, 90 down."""
    angles = np.radians(np.linspace(start, stop, count))
    return [(x + wide * np.cos(a), y + high * np.sin(a)) for a in angles]


SKETCHES: dict[str, list[Line]] = {
    "cat": [
        arc(50, 58, 33, 29, -50, 232), [(28, 36), (20, 11), (43, 31)], [(57, 31), (80, 11), (72, 36)],
        arc(50, 58, 33, 30, 255, 285),
        arc(38, 52, 4, 5), arc(62, 52, 4, 5), [(46, 63), (54, 63), (50, 67), (46, 63)],
        arc(45, 68, 5, 4, 0, 160), arc(55, 68, 5, 4, 20, 180),
        [(30, 64), (10, 60)], [(30, 68), (11, 71)], [(70, 64), (90, 60)], [(70, 68), (89, 71)],
    ],
    "apple": [
        arc(37, 60, 23, 29, 40, 300), arc(63, 60, 23, 29, -120, 140), [(50, 36), (51, 26), (57, 13)],
        arc(68, 20, 11, 6, 150, 510), arc(50, 33, 9, 5, 20, 160), arc(50, 88, 6, 4, 200, 340),
    ],
    "house": [
        [(20, 48), (20, 88), (80, 88), (80, 48)], [(12, 50), (50, 16), (88, 50)],
        [(42, 88), (42, 62), (58, 62), (58, 88)],
        [(27, 56), (36, 56), (36, 67), (27, 67), (27, 56)], [(64, 56), (73, 56), (73, 67), (64, 67), (64, 56)],
        [(66, 30), (66, 18), (75, 18), (75, 38)],
    ],
    "fish": [
        arc(44, 50, 32, 21, 25, 335), [(73, 41), (92, 28), (87, 50), (92, 72), (73, 59)], arc(25, 45, 3.5, 3.5),
        arc(36, 50, 8, 16, -60, 60),
        arc(46, 30, 14, 9, 190, 350), arc(50, 68, 10, 8, 20, 140), arc(13, 55, 6, 4, 10, 90),
    ],
}  # fmt: skip


def sketch(lines: Sequence[Line], seed: int = 0) -> Image.Image:
    """A pencil drawing on paper: strokes that tremble, on a sheet that the light falls on from one side."""
    rng = np.random.default_rng(seed)
    sheet = Image.new("L", (SIDE, SIDE), 255)
    pen = ImageDraw.Draw(sheet)
    for line in lines:
        points = np.asarray(dense(line)) * SIDE / 100
        drift = np.cumsum(rng.normal(0, 0.35, points.shape), axis=0)
        points += drift - np.linspace(drift[0], drift[-1], len(points))
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            pen.line([x0, y0, x1, y1], fill=int(rng.integers(40, 80)), width=7)
    lines_drawn = np.asarray(sheet.filter(ImageFilter.GaussianBlur(1.2)), np.float64) / 255
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    light = 1 - 0.16 * x - 0.08 * y
    grain = rng.normal(0, 0.012, (SIDE, SIDE))
    paper = np.stack([0.98 * light, 0.96 * light, 0.91 * light], axis=-1) + grain[..., None]
    return Image.fromarray(((paper * lines_drawn[..., None]).clip(0, 1) * 255).astype(np.uint8))


def dense(line: Line, step: float = 1.0) -> Line:
    """The points of a line, about `step` apart."""
    found = [line[0]]
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        count = max(int(np.hypot(x1 - x0, y1 - y0) / step), 1)
        found += [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in np.linspace(0, 1, count + 1)[1:]]
    return found


def cat() -> Image.Image:
    """A painted cat, for techniques that edit a picture: in flat colours, by nobody's set of emoji."""
    side, up = 128, 4
    picture = Image.new("RGB", (side * up, side * up), "white")
    pen = ImageDraw.Draw(picture)

    def at(*numbers: float) -> list[float]:
        return [number * up for number in numbers]

    for points in ((18, 62, 24, 10, 58, 36), (110, 62, 104, 10, 70, 36)):
        pen.polygon(at(*points), fill=(240, 165, 60))
    for points in ((27, 46, 30, 22, 46, 36), (101, 46, 98, 22, 82, 36)):
        pen.polygon(at(*points), fill=(250, 190, 190))
    pen.ellipse(at(12, 28, 116, 118), fill=(250, 180, 75))
    for x in (42, 86):
        pen.ellipse(at(x - 8, 58, x + 8, 78), fill=(60, 50, 50))
        pen.ellipse(at(x - 2, 61, x + 4, 67), fill="white")
    pen.polygon(at(56, 84, 72, 84, 64, 92), fill=(230, 90, 100))
    for left, right in ((50, 64), (64, 78)):
        pen.arc(at(left, 84, right, 100), 20, 160, fill=(90, 60, 50), width=2 * up)
    return picture.resize((side, side), Image.Resampling.LANCZOS)


def draw(folder: Path) -> None:
    """Writes all drawings."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in SKETCHES.items():
        sketch(lines).save(folder / f"sketch-{name}.jpg", quality=85)
    cat().save(folder / "painted-cat.png")
