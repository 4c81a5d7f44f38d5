"""The measures, each a function of a model and of art that returns figures by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cv2
import jax
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image

import sfumato
from benchmarks.quality.art import Art
from benchmarks.quality.features import Pictures, Space
from sfumato import CFG, ControlNet, Inpaint, Model
from tools.art.recolour import colour_of

Figures = dict[str, float]
NEAR = 1
"""Edges that lie so many pixels apart are the same."""


def draw(
    model: Model, prompts: Sequence[str], batch: int = 25, seed: int = 0,
    negative: Sequence[str] | None = None, steer: Callable[[Sequence[int]], Sequence[Any]] | None = None,
    **settings: Any,
) -> Pictures:  # fmt: skip
    """A picture for each prompt, number i with the seed `seed` + i; `negative` has one for each, too.

    `steer` makes the controls for the prompts of these numbers: always `batch` of them, so that one program does for
    all, the last of them repeated if there are too few.
    """
    found, places = [], np.arange(len(prompts))
    for at in range(0, len(prompts), batch):
        part = places[np.minimum(range(at, at + batch), len(prompts) - 1)]
        how = dict(settings)
        if negative is not None:
            how["negative"] = [negative[i] for i in part]
        if steer is not None:
            how["controls"] = steer(part)
        made = sfumato.generate(model, [prompts[i] for i in part], seed=(seed + part).tolist(), **how)
        found += [picture.array for picture in made][: len(prompts) - at]
    return np.stack(found)


def autoencoder(model: Model, art: Art, batch: int = 32) -> Figures:
    """PSNR in dB of pictures that are encoded and decoded: of all of them together, and by style."""

    errors = []
    for at in range(0, len(art), batch):
        part = art.pictures[at : at + batch].astype(np.float32)
        errors += list(np.square((rebuilt(model, part) - part) / 255).mean((1, 2, 3)))
    by_style = {style: [e for e, line in zip(errors, art.lines, strict=True) if line["style"] == style]
                for style in sorted({line["style"] for line in art.lines})}  # fmt: skip
    return {"PSNR": psnr(float(np.mean(errors)))} | {
        f"PSNR {style}": psnr(float(np.mean(found))) for style, found in by_style.items()
    }


def rebuilt(model: Model, pictures: Float[np.ndarray, "B H W 3"]) -> Float[np.ndarray, "B H W 3"]:
    """Pictures in [0, 255] as the autoencoder gives them back."""
    return (np.clip(np.asarray(_rebuilt(model.vae, pictures / 127.5 - 1)), -1, 1) + 1) * 127.5


@jax.jit
def _rebuilt(vae: Any, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    return vae.decode(vae.encode(pixels))


def psnr(mse: float) -> float:
    """Decibels of a mean square error of values in [0, 1]."""
    return -10 * float(np.log10(max(mse, 1e-10)))


def text(model: Model, asked: Art, space: Space, rounds: int = 1, **settings: Any) -> float:
    """The share of pictures, drawn for the prompts of `asked`, whose nearest neighbour is the concept asked for; in
    each round with other seeds."""
    made = [draw(model, asked.prompts, seed=each * len(asked), **settings) for each in range(rounds)]
    return float(np.mean([share(space.nearest(one), asked.concepts) for one in made]))


def share(found: Sequence[str], wanted: Sequence[str]) -> float:
    """How many of them are what is wanted."""
    return float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))


def ceiling(asked: Art, space: Space) -> float:
    """The same share for the real pictures that were held out: what the space itself can tell."""
    return share(space.nearest(asked.pictures), asked.concepts)


def negative(model: Model, asked: Art, **settings: Any) -> Figures:
    """Of things that have a colour of their own, the share that is drawn in it, without a negative prompt and with that
    colour, "red apple", as the negative prompt."""
    own = [colour_of(picture) for picture in asked.pictures]
    chosen = [number for number, colour in enumerate(own) if colour]
    prompts = [asked.prompts[number] for number in chosen]
    named = [f"{own[number]} {asked.concepts[number]}" for number in chosen]

    def kept(negative: list[str] | None) -> float:
        made = draw(model, prompts, negative=negative, **settings)
        return float(np.mean([colour_of(one) == own[number] for one, number in zip(made, chosen, strict=True)]))

    return {"own colour": kept(None), "own colour, as negative prompt": kept(named)}


def inpainting(model: Model, asked: Art, guidance: CFG, **settings: Any) -> Figures:
    """How visible the seam is where the right half of each picture has been drawn anew, against the real pictures;
    where it is the real half, encoded and decoded, which no model of these latents can do better; and where it has been
    drawn without a look at the left half."""
    width = asked.pictures.shape[2]
    mask = np.zeros(asked.pictures.shape[1:3], np.uint8)
    mask[:, width // 2 :] = 255

    def inpaint(part: Sequence[int]) -> Inpaint:
        return Inpaint([Image.fromarray(asked.pictures[i]) for i in part], mask)

    def steer(part: Sequence[int]) -> list[Any]:
        return [guidance, inpaint(part)]

    def seam(pictures: Any) -> float:
        left, right = (pictures[:, :, at].astype(float) for at in (width // 2 - 1, width // 2))
        return float(np.abs(left - right).mean())

    made = draw(model, asked.prompts, steer=steer, **settings)
    apart = np.where(mask[..., None] > 0, draw(model, asked.prompts, controls=[guidance], **settings), asked.pictures)
    best = np.round(rebuilt(model, asked.pictures.astype(np.float32))).astype(np.uint8)
    found = {"": made, " of the real half": inpaint(range(len(asked))).finish(best), " of two halves": apart}
    return {f"inpainting, seam{what}": seam(pictures) / seam(asked.pictures) for what, pictures in found.items()}


def edges(picture: Any) -> Bool[np.ndarray, "H W"]:
    """Where the canny annotator sees an edge."""
    return np.asarray(sfumato.annotate("canny", picture).convert("L")) > 127


def edge_f1(some: Bool[np.ndarray, "H W"], others: Bool[np.ndarray, "H W"]) -> float:
    """The harmonic mean of precision and recall of edges, each counted if the other has one within `NEAR` pixels."""
    kernel = np.ones((2 * NEAR + 1, 2 * NEAR + 1), np.uint8)
    wide = [cv2.dilate(each.astype(np.uint8), kernel) > 0 for each in (some, others)]
    precision = (others & wide[0]).sum() / max(others.sum(), 1)
    recall = (some & wide[1]).sum() / max(some.sum(), 1)
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def controlled(
    model: Model, net: Any, asked: Art, annotator: str, compare: Callable[[Any, Any], float],
    guidance: CFG, scale: float = 1.0, **settings: Any,
) -> float:  # fmt: skip
    """The mean over pictures of `compare(picture asked for, picture drawn under its control)`."""
    controls = [sfumato.annotate(annotator, picture) for picture in asked.pictures]

    def steer(part: Sequence[int]) -> list[Any]:
        return [guidance, ControlNet(net, [controls[i] for i in part], scale)]

    made = draw(model, asked.prompts, steer=steer, **settings)
    return float(np.mean([compare(one, other) for one, other in zip(asked.pictures, made, strict=True)]))


def same_edges(picture: Any, made: Any) -> float:
    """F1 of the edges of two pictures."""
    return edge_f1(edges(picture), edges(made))


def grey_psnr(picture: Any, made: Any) -> float:
    """PSNR of brightness (ITU-R BT.601) between two pictures."""
    weights = np.array([0.299, 0.587, 0.114])
    return psnr(float(np.square((picture @ weights - made @ weights) / 255).mean()))


def same_regions(picture: Any, made: Any) -> float:
    """`region_iou` of the regions that the annotator sees in two pictures."""
    some, others = (np.asarray(sfumato.annotate("regions", each)) for each in (picture, made))
    return region_iou(some, others)


def region_iou(some: Any, others: Any) -> float:
    """The mean, over the colours of a region map, of intersection over union, weighted by their areas in `some`."""
    total = 0.0
    for colour in np.unique(some.reshape(-1, 3), axis=0):
        one, other = ((each == colour).all(-1) for each in (some, others))
        total += one.mean() * (one & other).sum() / (one | other).sum()
    return float(total)
