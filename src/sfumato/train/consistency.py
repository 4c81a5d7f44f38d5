"""Whether a picture that is drawn under a control looks like the one that the control was made of.

The mean square error of latents hardly minds blurred edges: a weak one costs little, and where a line does not tell
which side is the lighter one, the mean of both answers is no edge at all. So what the network takes for the clean
latents is decoded and compared as a picture, as in ControlNet++ (arXiv:2404.07987, section 3.3), which compares what
an annotator sees in it. Here that is what most annotators start from: colours, and how strong edges are.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from sfumato.errors import SfumatoError
from sfumato.train.reconstruction import COLOURS, pooled
from sfumato.train.task import Metrics

SIZES = (1, 2, 4)
"""Of how many pixels across the squares are between which edges are looked for."""
MISSING = 3.0
"""How many times as much an edge counts that is too weak as one that is too strong. Where the network is not sure, the
best answer to both alike is their median, which is weak: more than half of what is around a line is flat."""


@dc.dataclass(frozen=True)
class Consistency:
    """A further term of the loss. Raises SfumatoError for negative weights and a share of no rows."""

    edges: float = 0.0
    """Weight of the mean difference of how strong edges are, see `MISSING`."""
    colours: float = 0.0
    """Weight of the mean absolute difference of colours: for controls that tell them."""
    every: int = 4
    """Decoding costs as much as a step of a small network, so only every so many rows of a batch are compared."""
    own: bool = False
    """Compare what the network makes of latents that it has come to itself, from twice the time (`Objective.onward`).
    Latents of the data with noise on them tell where edges are, so from them it does not learn to find them by the
    control alone, as it must where it draws."""

    def __post_init__(self) -> None:
        if not (self.edges >= 0 and self.colours >= 0 and self.every >= 1):
            raise SfumatoError(
                f"Weights of consistency are 0 or more, and every row from the first counts, not {self}."
            )

    def __call__(
        self, decode: Callable[[Array], Array], drawn: Float[Array, "B h w C"], latents: Float[Array, "B h w C"]
    ) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum for latents as they are `drawn` in one step and as they are, and its terms; of rows that
        were chosen already.

        All times count alike. Edges are lost where a picture is half noise: with less of it they are in the latents
        already, with more nothing is there yet to be blurred.
        """
        axes = jnp.array(COLOURS, jnp.float32).T
        made, real = (decode(each).astype(jnp.float32) @ axes for each in (drawn, latents))
        missing = [b - a for a, b in zip(strengths(made), strengths(real), strict=True)]
        edges = [jnp.where(each > 0, MISSING * each, -each).mean() for each in missing]
        terms = {"edges": jnp.stack(edges).mean() * 2 / (MISSING + 1), "colours": jnp.abs(made - real).mean()}
        return self.edges * terms["edges"] + self.colours * terms["colours"], terms


def strengths(pictures: Float[Array, "B H W C"]) -> list[Float[Array, "B h w"]]:
    """How much neighbours differ, in all channels together, between squares of each of `SIZES`."""
    found = []
    for size in SIZES:
        x = pooled(pictures, size)
        down, right = x[:, 1:, :-1] - x[:, :-1, :-1], x[:, :-1, 1:] - x[:, :-1, :-1]
        # The root's slope has no end at 0, where areas are flat.
        found.append(jnp.sqrt((jnp.square(down) + jnp.square(right)).sum(-1) + 1e-4))
    return found
