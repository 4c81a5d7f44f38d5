"""The adversarial term of autoencoders (arXiv:2012.09841, section 3.1; arXiv:2112.10752, appendix G)."""

from __future__ import annotations

import dataclasses as dc
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sfumato.errors import SfumatoError
from sfumato.models.layers import GroupNorm, conv
from sfumato.train.task import Metrics

T = TypeVar("T")

SLOPE, EPSILON = 0.2, 1e-5


@dc.dataclass(frozen=True)
class DiscriminatorConfig:
    """A `PatchDiscriminator`. Raises SfumatoError for sizes that no network can have."""

    width: int = 64
    """Channels after the first convolution. Each further one doubles them, up to eight times as many."""
    layers: int = 3
    """Convolutions that halve the picture: with 3 of them, each verdict is on 70 x 70 pixels."""
    norm_num_groups: int = 32

    def __post_init__(self) -> None:
        if min(self.width, self.layers, self.norm_num_groups) < 1:
            raise SfumatoError(f"A discriminator's sizes are 1 or more, and here one is not: {self}.")
        if any(width % self.norm_num_groups for width in self.widths[1:]):
            raise SfumatoError(
                f"norm_num_groups={self.norm_num_groups} does not divide all of the discriminator's channels "
                f"{self.widths[1:]}."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels after each convolution but the last one."""
        return tuple(self.width * min(2**level, 8) for level in range(self.layers + 1))


class PatchDiscriminator(nnx.Module):
    """Tells originals (above 0) from rebuilt pictures (below), patch by patch (arXiv:1611.07004, appendix 6.1.2).

    It is normalised by groups of channels of each picture, where the papers take statistics of the batch: those would
    make a verdict depend on the pictures beside it, and so the gradients on how the batch is divided over devices and
    over parts; and running means would be a state beside the weights.
    """

    def __init__(self, config: DiscriminatorConfig, *, rngs: nnx.Rngs):
        self.config, widths = config, config.widths
        self.conv_in = conv(3, widths[0], 4, stride=2, padding=1, rngs=rngs)
        self.blocks = nnx.List([
            Block(config, widths[i], widths[i + 1], 2 if i < config.layers - 1 else 1, rngs=rngs)
            for i in range(config.layers)
        ])  # fmt: skip
        self.conv_out = conv(widths[-1], 1, 4, padding=1, rngs=rngs)

    def __call__(self, pixels: Float[Array, "B H W 3"]) -> Float[Array, "B h w 1"]:
        """The verdicts on pictures in [-1, 1], float32. Raises SfumatoError for pictures smaller than one patch."""
        least = 3 * 2**self.config.layers
        if min(pixels.shape[1:3]) < least:
            raise SfumatoError(
                f"A discriminator of {self.config.layers} layers needs pictures of {least} x {least} pixels or more, "
                f"and these have {pixels.shape[2]} x {pixels.shape[1]}."
            )
        x = jax.nn.leaky_relu(self.conv_in(pixels.astype(self.conv_in.kernel.dtype)), SLOPE)
        for block in self.blocks:
            x = block(x)
        return self.conv_out(x).astype(jnp.float32)


class Block(nnx.Module):
    """Convolution, normalization, leaky ReLU."""

    def __init__(self, config: DiscriminatorConfig, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        self.conv = conv(inputs, outputs, 4, stride=stride, padding=1, rngs=rngs)
        self.norm = GroupNorm(config.norm_num_groups, outputs, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return jax.nn.leaky_relu(self.norm(self.conv(x)), SLOPE)


@dc.dataclass(frozen=True)
class Adversarial:
    """What a discriminator, trained in the same steps, adds to the loss of an autoencoder.

    The weight is a plain number: the papers multiply theirs by the ratio of two gradients' norms at the decoder's last
    layer (arXiv:2012.09841, eq. 7), which is not done here. `fit` clips the gradients of both sides together. Raises
    SfumatoError for negative numbers.
    """

    weight: float = 0.1
    """Weight of the generator's term; with 0 there is no discriminator."""
    start: int = 0
    """Steps before both sides begin."""
    discriminator: DiscriminatorConfig = dc.field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        if not self.weight >= 0 or self.start < 0:
            raise SfumatoError(f"Weight and start of an adversarial term are 0 or more: {self}.")

    def __call__(
        self, net: PatchDiscriminator, rebuilt: Float[Array, "B H W 3"], pixels: Float[Array, "B H W 3"],
        step: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
        """What is added in step number `step`, and both sides' losses ("generator", "discriminator").

        It is one sum, whose gradient with respect to the autoencoder is that of the generator's term alone, and with
        respect to `net` that of the hinge loss alone.
        """
        generator = -stopped(net)(rebuilt).mean()
        discriminator = hinge(net(pixels), net(stopped(rebuilt)))
        on = jnp.asarray(step >= self.start, jnp.float32)
        return on * (self.weight * generator + discriminator), {"generator": generator, "discriminator": discriminator}


def hinge(real: Float[Array, "B h w 1"], fake: Float[Array, "B h w 1"]) -> Float[Array, ""]:
    """The discriminator's loss: verdicts above 1 on originals and below -1 on rebuilt pictures cost nothing
    (arXiv:1705.02894)."""
    return (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2


def stopped(tree: T) -> T:
    """The same as a constant."""
    return jax.tree.map(jax.lax.stop_gradient, tree)
