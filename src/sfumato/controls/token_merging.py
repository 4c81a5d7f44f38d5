"""Token merging: fewer tokens in the largest self-attention layers."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import ClassVar

from sfumato.controls.base import Control, Latents, Request
from sfumato.controls.check import finite, window
from sfumato.errors import SfumatoError
from sfumato.types import Conditioning, Merging, Step, Window, pytree, static

MOST = 0.75
"""One token of each 2 x 2 square stays."""


@pytree
class TokenMerging(Control):
    """The share `ratio` of tokens, those most like another one, is merged into that one before each self-attention
    layer of the highest resolution, and gets its result after it (ToMe for Stable Diffusion, arXiv:2303.17604).

    `ratio` lies in [0, 0.75]; 0 is without, as is every row outside of `window`. It sets the shapes of arrays, so that
    another ratio is another program. Layers whose attention maps other controls look at or change merge nothing, and
    neither do ControlNets.

    The authors choose which tokens others may be merged into at random, one of each 2 x 2 square, and compare tokens
    before normalization. Here it is the first of each square, and what the layer sees is compared.
    """

    ratio: float = static(default=0.5)
    window: Window = Window()

    excludes: ClassVar[Mapping[str, str]] = {"TokenMerging": "one says how many tokens go"}

    def prepare(self, request: Request) -> TokenMerging:
        if not any(path.endswith(".attn1") for path in request.model.unet.attention_paths()):
            name = request.model.name or "The model"
            raise SfumatoError(f"TokenMerging is for self-attention layers, and {name} has none.")
        ratio = finite("TokenMerging's ratio", self.ratio, 0, MOST)
        return TokenMerging(ratio, window("TokenMerging", self.window))

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:
        merging = Merging(self.window.active(step), self.ratio)
        return {name: dc.replace(cond, merging=merging) for name, cond in conds.items()}
