"""One resolution level of the UNet: down, middle, up. They serve the UNet and the ControlNet alike."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels
from sfumato.models.attention import NO_TAPS, Maps, Taps, Transformer, above, below, maybe_remat
from sfumato.models.blocks import Downsample, ResnetBlock, Upsample
from sfumato.models.config import EncoderConfig, UNetConfig


def resnet(config: EncoderConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> ResnetBlock:
    """A residual block with the settings of `config`."""
    return ResnetBlock(
        inputs, outputs, time=config.time_dim, groups=config.norm_num_groups, epsilon=config.norm_eps,
        activation=config.act_fn, rngs=rngs,
    )  # fmt: skip


def transformer(config: EncoderConfig, level: int, rngs: nnx.Rngs) -> Transformer:
    """The transformer of a level (counted from the top) with the settings of `config`."""
    return Transformer(
        config.block_out_channels[level], config.heads(level), config.context_dim(level), depth=config.depth(level),
        groups=config.norm_num_groups, use_linear=config.use_linear_projection, rngs=rngs,
    )  # fmt: skip


class Level(nnx.Module):
    """Residual blocks, each followed by a transformer where the level has attention."""

    resnets: nnx.List[ResnetBlock]
    attentions: nnx.List[Transformer]
    """Not there in a level without attention."""

    def layer(self, i: int, x: Array, emb: Array, context: Array, taps: Taps, remat: bool) -> tuple[Array, Maps]:
        x = maybe_remat(remat, lambda block, x, emb: block(x, emb))(self.resnets[i], x, emb)
        if not hasattr(self, "attentions"):
            return x, {}
        name = f"attentions.{i}"
        x, maps = self.attentions[i](x, context, below(taps, name), remat)
        return x, above(name, maps)


class DownBlock(Level):
    """A level on the way down. Returns every intermediate result, for the skip connections."""

    def __init__(self, config: EncoderConfig, level: int, *, rngs: nnx.Rngs):
        channels, layers = config.block_out_channels, range(config.layers(level))
        first, width = channels[max(level - 1, 0)], channels[level]
        self.resnets = nnx.List([resnet(config, width if i else first, width, rngs) for i in layers])
        if config.down_block_types[level] == "CrossAttnDownBlock2D":
            self.attentions = nnx.List([transformer(config, level, rngs) for _ in layers])
        if level < len(channels) - 1:
            # As in the autoencoder, no padding means padding below and to the right.
            padding = config.downsample_padding or ((0, 1), (0, 1))
            self.downsamplers = nnx.List([Downsample(width, padding=padding, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"],
        taps: Taps = NO_TAPS, remat: bool = False, first: int = 0,
    ) -> tuple[list[Array], Maps]:  # fmt: skip
        """All of it, or what is left after the `first` layers."""
        skips, maps = self.layers(x, emb, context, taps, remat, range(first, len(self.resnets)))
        if hasattr(self, "downsamplers"):
            skips.append(self.downsamplers[0](skips[-1] if skips else x))
        return skips, maps

    def layers(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"], taps: Taps,
        remat: bool, which: Iterable[int],
    ) -> tuple[list[Array], Maps]:  # fmt: skip
        """Some of its layers alone."""
        skips, maps = [], {}
        for i in which:
            x, got = self.layer(i, x, emb, context, taps, remat)
            skips.append(x)
            maps |= got
        return skips, maps


class MidBlock(nnx.Module):
    """The lowest level: a residual block, a transformer and a residual block (or just the first, "UNetMidBlock2D")."""

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs):
        level, width = len(config.block_out_channels) - 1, config.block_out_channels[-1]
        attends = config.mid_block_type == "UNetMidBlock2DCrossAttn"
        self.resnets = nnx.List([resnet(config, width, width, rngs) for _ in range(1 + attends)])
        self.attentions = nnx.List([transformer(config, level, rngs)] if attends else [])

    def __call__(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"],
        taps: Taps = NO_TAPS, remat: bool = False,
    ) -> tuple[Float[Array, "B H W C"], Maps]:  # fmt: skip
        run = maybe_remat(remat, lambda block, x, emb: block(x, emb))
        x, maps = run(self.resnets[0], x, emb), {}
        for i, attention in enumerate(self.attentions):
            x, got = attention(x, context, below(taps, f"attentions.{i}"), remat)
            x, maps = run(self.resnets[i + 1], x, emb), maps | above(f"attentions.{i}", got)
        return x, maps


class UpBlock(Level):
    """A level on the way up; each layer takes one skip connection from the end of the list."""

    def __init__(self, config: UNetConfig, level: int, *, rngs: nnx.Rngs):
        channels, index = config.block_out_channels, len(config.block_out_channels) - 1 - level
        width = channels[level]
        below_width, above_width = channels[min(level + 1, len(channels) - 1)], channels[max(level - 1, 0)]
        layers = range(config.layers(level) + 1)
        self.resnets = nnx.List([
            resnet(config, (width if i else below_width) + (width if i < layers[-1] else above_width), width, rngs)
            for i in layers
        ])  # fmt: skip
        if config.up_block_types[index] == "CrossAttnUpBlock2D":
            self.attentions = nnx.List([transformer(config, level, rngs) for _ in layers])
        if level > 0:
            self.upsamplers = nnx.List([Upsample(width, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "B H W C"], skips: list[Array], emb: Float[Array, "B M"],
        context: Float[Array, "B L D"], taps: Taps = NO_TAPS, remat: bool = False, part: slice = slice(None),
    ) -> tuple[Float[Array, "B h w C2"], Maps]:  # fmt: skip
        """All of it, or a part of the layers of the last level, which has no upsampling."""
        maps = {}
        for i in range(len(self.resnets))[part]:
            x = kernels.joined(x, skips.pop())
            x, got = self.layer(i, x, emb, context, taps, remat)
            maps |= got
        if hasattr(self, "upsamplers"):
            x = self.upsamplers[0](x, (skips[-1].shape[1], skips[-1].shape[2]))
        return x, maps
