"""ControlNet (arXiv:2302.05543): a second encoder half that sees a control picture and adds to the UNet's skips."""

from __future__ import annotations

from itertools import pairwise

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.gate import gate
from sfumato.models.attention import Heard
from sfumato.models.config import ControlNetConfig
from sfumato.models.layers import conv, silu
from sfumato.models.unet import Encoder
from sfumato.types import Conditioning, Residuals


class ControlEmbedding(nnx.Module):
    """Brings the control picture from pixel size to latent size (section 3.2); ends in a zero convolution."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs):
        widths = config.conditioning_embedding_out_channels
        self.conv_in = conv(config.conditioning_channels, widths[0], rngs=rngs)
        self.blocks = nnx.List([
            layer
            for width, wider in pairwise(widths)
            for layer in (conv(width, width, rngs=rngs), conv(width, wider, stride=2, rngs=rngs))
        ])  # fmt: skip
        self.conv_out = conv(widths[-1], config.block_out_channels[0], zero=True, rngs=rngs)

    def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        h = silu(self.conv_in(image))
        for block in self.blocks:
            h = silu(block(h))
        return self.conv_out(h)


class ControlNet(Encoder):
    """The trainable copy of the UNet's encoder half and its zero convolutions."""

    def __init__(self, config: ControlNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.config = config
        self.controlnet_cond_embedding = ControlEmbedding(config, rngs=rngs)
        channels, last = config.block_out_channels, len(config.block_out_channels) - 1
        widths = [channels[0]]
        for level, width in enumerate(channels):
            widths += [width] * (config.layers(level) + (level < last))
        self.controlnet_down_blocks = nnx.List([conv(width, width, 1, zero=True, rngs=rngs) for width in widths])
        self.controlnet_mid_block = conv(channels[-1], channels[-1], 1, zero=True, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B h w C"], t: Float[Array, ""] | Float[Array, " B"], cond: Conditioning,
        image: Float[Array, "B H W K"],
    ) -> Residuals:  # fmt: skip
        """What this net adds to the UNet at strength 1.

        `x` are the same noisy latents as the UNet's (without its extra channels), `image` the control picture in
        [0, 1] at pixel size. Residuals are [B 1 1 C] where the net averages them over the picture. Where the UNet
        leaves out its deeper part (`cond.reuse`), so does this net, and what it adds there means nothing.
        """
        return self.residuals(x, t, cond, self.hint(image))

    def hint(self, image: Float[Array, "B H W K"]) -> Float[Array, "B h w D"]:
        """What it makes of a control picture in [0, 1], at latent size. No time and no text is in it."""
        if self.config.controlnet_conditioning_channel_order == "bgr":
            image = image[..., ::-1]
        return self.controlnet_cond_embedding(image.astype(self.dtype))

    def residuals(
        self, x: Float[Array, "B h w C"], t: Float[Array, ""] | Float[Array, " B"], cond: Conditioning,
        hint: Float[Array, "B h w D"],
    ) -> Residuals:  # fmt: skip
        """As a call, with the `hint` of the control picture."""
        t = jnp.broadcast_to(t, x.shape[:1])
        taps = {path: Heard(keys) for path, keys in (cond.heard or {}).items()}
        emb = self.embed(self.config, t, cond)
        h = self.conv_in(x.astype(self.dtype)) + hint
        context, layers = cond.context.astype(self.dtype), cond.reuse.layers if cond.reuse else 1
        skips, _ = self.outside(h, emb, context, taps, layers)

        def deep() -> tuple[list[Array], Array]:
            return self.inside(skips[-1], emb, context, taps, layers)[:2]

        more, mid = gate(cond.reuse.full, deep) if cond.reuse else deep()
        skips = skips + more
        down = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        mid = self.controlnet_mid_block(mid)
        if self.config.global_pool_conditions:
            down, mid = [r.mean((1, 2), keepdims=True) for r in down], mid.mean((1, 2), keepdims=True)
        return Residuals(tuple(down), mid)
