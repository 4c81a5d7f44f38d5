"""Extra input channels of the network."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

from jaxtyping import Array, Float

from sfumato.controls.base import Control, Latents
from sfumato.types import Conditioning, Step, pytree


@pytree
class Channels(Control):
    """The same extra channels in every row and for every branch: what several techniques become when prepared."""

    channels: Float[Array, "B h w E"]

    per_picture = frozenset({"channels"})
    sets_channels = True

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:
        return {name: dc.replace(cond, channels=self.channels) for name, cond in conds.items()}
