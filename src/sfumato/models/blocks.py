"""The convolutional blocks that the UNet, the ControlNet and the autoencoder are made of."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels, large
from sfumato.models.held import Held
from sfumato.models.kernels.normalization import MANY
from sfumato.models.layers import ACTIVATIONS, GroupNorm, conv, linear


class ResnetBlock(nnx.Module):
    """Two normalized convolutions beside a skip connection (arXiv:1512.03385), the time added in between.

    `time` is the width of the time embedding, None where there is no time (the autoencoder).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        time: int | None,
        groups: int,
        epsilon: float,
        activation: str = "silu",
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.norm1 = GroupNorm(groups, inputs, epsilon=epsilon, rngs=rngs)
        self.conv1 = conv(inputs, outputs, rngs=rngs)
        if time is not None:
            self.time_emb_proj = linear(time, outputs, rngs=rngs)
        self.norm2 = GroupNorm(groups, outputs, epsilon=epsilon, rngs=rngs)
        self.conv2 = conv(outputs, outputs, rngs=rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W I"], emb: Float[Array, "B M"] | None = None) -> Float[Array, "B H W O"]:
        return large.residual(self, x, emb) if large.is_large(self, x) else self.plainly(x, emb)

    def plainly(self, x: Float[Array, "B H W I"], emb: Float[Array, "B M"] | None) -> Float[Array, "B H W O"]:
        """Layer by layer."""
        act = ACTIVATIONS[self.activation]
        skip = self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x
        # Of large pictures alone: it saves a copy of them, and a training step of small ones takes longer.
        last = skip if skip is not x and x.shape[1] * x.shape[2] >= MANY else None
        h = self.conv1(act(self.norm1(x, last)))
        if emb is not None:
            h = kernels.plus(h, self.time_emb_proj(act(emb))[:, None, None])
        h = self.conv2(act(self.norm2(h)))
        return h + skip


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution.

    `padding` is 1 in the UNet; the autoencoder pads only below and to the right, ((0, 1), (0, 1)).
    """

    def __init__(self, channels: int, *, padding: int | tuple = 1, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, stride=2, padding=padding, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width (or fits them to `size`) by nearest neighbours, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w C"], size: tuple[int, int] | None = None) -> Float[Array, "B H W C"]:
        twice = (2 * x.shape[1], 2 * x.shape[2])
        layer = self.conv.restored(x) if isinstance(self.conv, Held) else self.conv
        if isinstance(layer, nnx.Conv) and size in (None, twice):
            return kernels.conv_of_doubled(x, layer.kernel[...], None if layer.bias is None else layer.bias[...])
        return self.conv(nearest(x, size or twice))


def nearest(x: Float[Array, "B h w C"], size: tuple[int, int]) -> Float[Array, "B H W C"]:
    """Nearest-neighbour resize where output row i shows input row floor(i h / H), as torch's `interpolate` does."""
    if size == (2 * x.shape[1], 2 * x.shape[2]):
        return kernels.twice(x)
    rows, cols = (jnp.arange(new) * old // new for new, old in zip(size, x.shape[1:3], strict=True))
    return x[:, rows][:, :, cols]
