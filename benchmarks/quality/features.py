"""A fixed space in which pictures of the same thing are near each other, though drawn in different styles.

A picture is cropped to what is not white, made square and 128 pixels wide. Its features are the colours of 8 x 8 fields
(brightness and two axes of colour) and the directions of edges, unsigned and in 9 bins, in 4 x 4 and in 8 x 8 fields
(histograms of oriented gradients, CVPR 2005, Dalal and Triggs). Each of the three counts alike: its squared distances
are divided by their mean between the pictures that are searched. Nothing in it is learnt.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, Int, UInt8

from sfumato.train.reconstruction import COLOURS

SIDE = 128
WHITE = 250
"""From this value on, in all three colours, a pixel is background."""

Pictures = UInt8[np.ndarray, "N H W 3"]


class Space:
    """Known pictures with names, and what is nearest to others."""

    def __init__(self, pictures: Pictures, names: list[str]):
        self.names = np.array(names)
        self.parts = features(pictures)
        self.scales = [_distances(part[::7], part).mean() for part in self.parts]

    def nearest(self, pictures: Pictures) -> list[str]:
        """The name of the known picture that is nearest to each."""
        pairs = zip(features(pictures), self.parts, self.scales, strict=True)
        total = np.sum([_distances(new, known) / scale for new, known, scale in pairs], axis=0)
        return self.names[total.argmin(1)].tolist()


def _distances(some: Float[np.ndarray, "N F"], others: Float[np.ndarray, "M F"]) -> Float[np.ndarray, "N M"]:
    squares = np.square(some).sum(1)[:, None] + np.square(others).sum(1)[None]
    return np.maximum(squares - 2 * some @ others.T, 0)


def features(pictures: Pictures) -> list[Float[np.ndarray, "N F"]]:
    """Colours, coarse and fine edges of each picture."""
    squares = [cropped(picture) for picture in pictures]
    kinds = (colours, lambda picture: directions(picture, 4), lambda picture: directions(picture, 8))
    return [np.stack([kind(square) for square in squares]) for kind in kinds]


def cropped(picture: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
    """What is not white, in the middle of a white square."""
    rows, columns = np.nonzero((picture < WHITE).any(-1))
    if not len(rows):
        return np.full((SIDE, SIDE, 3), 255, np.uint8)
    part = picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = part.shape[:2]
    side = max(height, width)
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = part
    return cv2.resize(square, (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def colours(picture: UInt8[np.ndarray, "S S 3"]) -> Float[np.ndarray, " F"]:
    """The colours of 8 x 8 fields."""
    small = cv2.resize(picture, (8, 8), interpolation=cv2.INTER_AREA).astype(np.float32)
    return (small / 255 @ np.array(COLOURS, np.float32).T).ravel()


def directions(picture: UInt8[np.ndarray, "S S 3"], fields: int) -> Float[np.ndarray, " F"]:
    """How strong edges of 9 directions are in so many fields a side, as shares; square roots, so that the distance is
    that of Hellinger."""
    grey = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA).astype(np.float32).mean(-1) / 255
    across, down = np.zeros_like(grey), np.zeros_like(grey)
    across[:, 1:-1], down[1:-1] = grey[:, 2:] - grey[:, :-2], grey[2:] - grey[:-2]
    bins: Int[np.ndarray, "64 64"] = ((np.arctan2(down, across) % np.pi) / np.pi * 9).astype(int) % 9
    rows, columns = np.mgrid[:64, :64] * fields // 64
    found = np.zeros((fields, fields, 9), np.float32)
    np.add.at(found, (rows, columns, bins), np.hypot(across, down))
    return np.sqrt(found / (found.sum() + 1e-6)).ravel()
