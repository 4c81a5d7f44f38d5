"""The types that every room shares, and the axis names used in every signature.

Axes: ``B`` pictures (or rows) in a batch, ``H W`` height and width (latent or pixel, as the docstring says),
``C`` channels, ``L`` text tokens, ``D`` width of a feature, ``P`` width of the pooled text, ``E`` extra input
channels, ``N`` attention heads, ``Q K`` queries and keys, ``T`` size numbers of SDXL (6, or 5 for its refiner).
Arrays are channel-last everywhere.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, dataclass_transform

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

T = TypeVar("T")
if TYPE_CHECKING:
    Numbers = Any
else:  # tables are numpy arrays on the host, and jax arrays inside the loop
    Numbers = Array | np.ndarray


def static(**kwargs: Any) -> Any:
    """A dataclass field that is part of the program and not of the data: changing it compiles anew."""
    return dc.field(metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(dc.field, static))
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass that jax can pass through its transformations; fields made by `static` are not leaves.

    `jax.tree_util.register_dataclass` would do, but by jaxlib 0.10.2 two such classes with as many fields have equal
    structures, and one in sixty times a program that was compiled for the one is run for the other.
    """
    made: Any = dc.dataclass(frozen=True)(cls)
    static_ones = tuple(field.name for field in dc.fields(made) if field.metadata.get("static"))
    leaves = tuple(field.name for field in dc.fields(made) if field.name not in static_ones)
    keys = tuple(map(jax.tree_util.GetAttrKey, leaves))

    def flatten(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return tuple([getattr(value, name) for name in leaves]), tuple([getattr(value, name) for name in static_ones])

    def with_keys(value: T) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        children, rest = flatten(value)
        return tuple(zip(keys, children, strict=True)), rest

    def unflatten(rest: tuple[Any, ...], children: Iterable[Any]) -> T:
        return made(**dict(zip(leaves, children, strict=True)), **dict(zip(static_ones, rest, strict=True)))

    jax.tree_util.register_pytree_with_keys(made, with_keys, unflatten, flatten)
    return made


@pytree
class Residuals:
    """What a ControlNet adds to a UNet: one array for each skip connection, and one for the middle block."""

    down: tuple[Float[Array, "B _ _ _"], ...]
    mid: Float[Array, "B _ _ _"]


Keys = tuple[Float[Array, "B _ _"], Float[Array, "B _ _"]]
"""Keys and values of an attention layer: for each token those of all heads side by side."""

Deep = tuple[Float[Array, "B H W F"], dict[str, Float[Array, "B _ _ _"]]]
"""What the deeper part of a UNet has made in an evaluation, for later ones to go on with: what the outermost layers on
the way up begin with, residuals of ControlNets included, and the attention maps that were asked for in that part."""


@pytree
class Reuse:
    """Says that a network may leave out its deeper part (DeepCache, arXiv:2312.00858)."""

    full: Bool[Array, ""]
    """Whether it is computed all the same."""
    kept: Deep | None
    """What takes its place otherwise; None if nothing is there yet, and for a ControlNet, which adds nothing there."""
    layers: int = static(default=2)
    """How many layers of the last level on the way up are computed in any case, and what they need on the way down."""


@pytree
class Merging:
    """Says that similar tokens are merged in self-attention at the highest resolution (arXiv:2303.17604)."""

    on: Bool[Array, ""]
    ratio: float = static(default=0.5)
    """The share of tokens that go; it sets shapes, and is part of the program."""


@pytree
class Conditioning:
    """All that the UNet sees besides the latents and the time."""

    context: Float[Array, "B L D"]
    """Text features, the keys and values of cross-attention."""
    pooled: Float[Array, "B P"] | None = None
    """SDXL: the pooled text features."""
    time_ids: Float[Array, "B T"] | None = None
    """SDXL: original height and width, crop top and left, target height and width, in pixels."""
    channels: Float[Array, "B H W E"] | None = None
    """Extra input channels (depth, the picture to be edited, mask and masked picture), at latent size."""
    residuals: Residuals | None = None
    """The sum of what all ControlNets add."""
    guidance: Float[Array, "B G"] | None = None
    """Distilled models: the embedding of the guidance scale."""
    reuse: Reuse | None = None
    """One for all rows, but for what was kept."""
    merging: Merging | None = None
    """One for all rows."""
    heard: dict[str, Keys] | None = None
    """What the network's layers make of `context`, by checkpoint path, where that is known already (`UNet.hear`)."""


@pytree
class Prediction:
    """What the UNet returns."""

    eps: Float[Array, "B H W C"]
    """The raw output in the model's own terms (noise, velocity or clean latents), float32."""
    taps: dict[str, Float[Array, "B _ _ _"]]
    """Attention probabilities [B N Q K] of the layers that were asked for, by checkpoint path, float32."""
    kept: Deep | None = None
    """What its deeper part has made, or what took its place, if the conditioning has `reuse`."""


@pytree
class Step:
    """One evaluation of the network: a row of a sampler's table. In a table every array has the rows as first axis."""

    index: Int[Numbers, "*N"]
    """The row's number, from 0."""
    progress: Float[Numbers, "*N"]
    """The share of the steps before this one, in [0, 1): what windows are measured in."""
    active: Bool[Numbers, "*N"]
    """False for rows that are passed over: those before the start of image-to-image, and padding."""
    last: Bool[Numbers, "*N"]
    """True in the row that ends the whole process."""
    t: Float[Numbers, "*N"]
    """The time that the network is told, in the training schedule's numbering."""
    alpha: Float[Numbers, "*N"]
    """The share of the picture in the latents that are evaluated: x = alpha x0 + sigma eps."""
    sigma: Float[Numbers, "*N"]
    alpha_next: Float[Numbers, "*N"]
    """The share of the picture in the latents that come out of this row."""
    sigma_next: Float[Numbers, "*N"]
    coefficients: Mapping[str, Float[Numbers, ...]]
    """What else the sampler needs, worked out in float64 before anything is compiled."""
    noise: Float[Numbers, "*N B H W C"] | None = None
    """Standard normal noise for samplers that take some in every row."""


@pytree
class Window:
    """A part of the sampling process, from `start` (inclusive) to `stop` (exclusive) in shares of the steps.

    The only window rule there is: a row is inside if start <= progress < stop.
    """

    start: Float[Array, ""] | float = 0.0
    stop: Float[Array, ""] | float = 1.0

    def active(self, step: Step) -> Bool[Numbers, "*N"]:
        """Whether `step` is inside, or each row of a table."""
        return (step.progress >= self.start) & (step.progress < self.stop)
