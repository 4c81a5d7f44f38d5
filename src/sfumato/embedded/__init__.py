"""What comes with the package: a small model that sfumato has trained, with its ControlNets and adapters.

`PIECES` is the table; the folder `weights` beside this file holds them. Wherever a path or a hub id is asked for, such
a name will do: `sfumato.load("emoji")`.
"""

from __future__ import annotations

import dataclasses as dc
from pathlib import Path
from typing import Literal

WEIGHTS = Path(__file__).parent / "weights"
DEFAULT = "emoji"
"""The model that is taken where none is named."""


@dc.dataclass(frozen=True)
class Piece:
    """A model, or something that goes with one."""

    name: str
    kind: Literal["model", "controlnet", "lora", "embedding"]
    about: str
    """What it is for, in a line."""
    annotators: tuple[str, ...] = ()
    """Of a ControlNet: what makes its control pictures."""
    of: str = DEFAULT
    """The model that it belongs to; a model's own name."""

    @property
    def path(self) -> Path:
        """Where it is: a folder in the diffusers layout, or a file."""
        return WEIGHTS / (self.name if self.kind in ("model", "controlnet") else f"{self.name}.safetensors")

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        files = [self.path] if self.path.is_file() else self.path.rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())


PIECES = (
    Piece(DEFAULT, "model", "Emoji of 150 nouns in the styles noto, twemoji and fluent 3d, 128x128 pixels."),
    Piece("emoji-lines", "controlnet", "Edges, scribbles, and sketches on paper.", ("canny", "scribble", "sketch")),
    Piece("emoji-regions", "controlnet", "Flat areas in sixteen colours.", ("regions",)),
    Piece("emoji-grayscale", "controlnet", "Colours for a grey picture.", ("grayscale",)),
    Piece("emoji-blob", "lora", "The style of Noto's older blob emoji: say 'noto blob style'."),
    Piece("emoji-blue-heart", "embedding", "A word that the model did not know: <blue-heart>."),
    Piece("emoji-painted-cat", "lora", "A cat of our own painting: say 'a sks cat face'."),
)  # fmt: skip


def find(name: object) -> Piece | None:
    """The piece of this name, if there is one."""
    return next((piece for piece in PIECES if piece.name == name), None)


def controlnet_for(model: object, annotator: str) -> Piece | None:
    """The ControlNet that comes with an embedded model for an annotator's pictures, if there is one."""
    of_model = (piece for piece in PIECES if piece.kind == "controlnet" and piece.of == model)
    return next((piece for piece in of_model if annotator in piece.annotators), None)
