"""The autoencoder between pictures and latents ("AutoencoderKL"; arXiv:2112.10752, section 3.1 and appendix G)."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.errors import SfumatoError
from sfumato.models import kernels, large
from sfumato.models.attention import maybe_remat
from sfumato.models.blocks import Downsample, ResnetBlock, Upsample
from sfumato.models.layers import ACTIVATIONS, GroupNorm, conv, linear, silu
from sfumato.types import pytree

EPSILON = 1e-6
"""Of every normalization in this network; the format has no option for it."""

VAE_OLD_NAMES: Mapping[str, str] = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Layers of the attention, by the names they had in files of the diffusers format up to 2023."""


@dc.dataclass(frozen=True)
class VAEConfig:
    """An autoencoder with a Gaussian bottleneck ("AutoencoderKL")."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    """Pixels that the network was trained at. Kept for the files."""
    scaling_factor: float | int = 0.18215
    """What the latents are multiplied by for the UNet, so that their variance is about 1."""
    shift_factor: float | int | None = None
    """What is subtracted from the latents before that."""
    latents_mean: tuple[float | int, ...] | None = None
    """The mean of each latent channel, subtracted instead of `shift_factor`."""
    latents_std: tuple[float | int, ...] | None = None
    """The deviation of each latent channel, divided by."""
    force_upcast: bool = True
    """The activations overflow float16: with weights of that type, compute in float32."""
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    neutral: ClassVar[Mapping[str, object]] = {"double_z": True}

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            value = getattr(self, name)
            if len(value) != levels:
                raise SfumatoError(f"{name} has {len(value)} entries for {levels} levels (block_out_channels).")
            if set(value) - {kind}:
                raise SfumatoError(f"{name} {value!r} is not supported, only {kind!r} is.")
        if self.act_fn not in ACTIVATIONS:
            raise SfumatoError(f"act_fn {self.act_fn!r} is not supported, only {', '.join(ACTIVATIONS)} are.")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise SfumatoError(
                    f"norm_num_groups={self.norm_num_groups} does not divide the {channels} channels of "
                    "block_out_channels."
                )
        if not self.scaling_factor:
            raise SfumatoError("scaling_factor is 0, so no latents could be scaled back.")
        if (self.latents_mean is None) != (self.latents_std is None):
            raise SfumatoError("latents_mean and latents_std go together, but only one of them is given.")
        for name in ("latents_mean", "latents_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.latent_channels:
                raise SfumatoError(f"{name} has {len(value)} entries for {self.latent_channels} latent_channels.")


@pytree
class Gaussian:
    """The distribution of the latents of a picture, independent at each place, float32 and unscaled."""

    mean: Float[Array, "B H W C"]
    logvar: Float[Array, "B H W C"]

    @classmethod
    def of(cls, moments: Float[Array, "B H W M"]) -> Gaussian:
        """From what the encoder returns; the logarithm of the variance is kept within [-30, 20]."""
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return cls(mean, logvar.clip(-30, 20))

    def sample(self, noise: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The latents that standard normal `noise` stands for (arXiv:1312.6114, section 2.4)."""
        return self.mean + jnp.exp(self.logvar / 2) * noise

    def kl(self) -> Float[Array, " B"]:
        """The divergence from the standard normal distribution, summed over a picture, in nats (ibid., appendix B)."""
        return (self.mean**2 + jnp.exp(self.logvar) - 1 - self.logvar).sum((1, 2, 3)) / 2


class AutoencoderKL(nnx.Module):
    """Pictures to latents and back.

    Gradient checkpointing is the attribute `remat` of `encoder` and `decoder`: set it to True to recompute each block
    in the backward pass instead of keeping what is in it. On CPU it saves memory only under
    `jax.jit(..., compiler_options=sfumato.compiler.BARRIERS)`, for a pass of the compiler lets the second computation
    be scheduled beside the first one.
    """

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        if config.use_quant_conv:
            self.quant_conv = conv(2 * latents, 2 * latents, 1, rngs=rngs)
        if config.use_post_quant_conv:
            self.post_quant_conv = conv(latents, latents, 1, rngs=rngs)

    @property
    def factor(self) -> int:
        """Pixels that a latent stands for, along each side."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def moments(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        """The mean and the logarithm of the variance of the latents, one after the other along the channels, unscaled.

        `pixels` lie in [-1, 1].
        """
        h = self.encoder(pixels.astype(self._dtype))
        return self.quant_conv(h) if self.config.use_quant_conv else h

    def posterior(self, pixels: Float[Array, "B H W C"]) -> Gaussian:
        """The distribution of the unscaled latents of `pixels`, which lie in [-1, 1]."""
        return Gaussian.of(self.moments(pixels))

    def encode(
        self, pixels: Float[Array, "B H W C"], noise: Float[Array, "B h w Z"] | None = None
    ) -> Float[Array, "B h w Z"]:
        """Latents as the UNet sees them, float32: those that standard normal `noise` picks, the mean without it.

        `pixels` lie in [-1, 1].
        """
        found = self.posterior(pixels)
        return self.scale(found.mean if noise is None else found.sample(noise))

    def decode(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """The picture of latents as the UNet sees them: float32, about [-1, 1], not clipped."""
        h = self.unscale(latents).astype(self._dtype)
        h = self.post_quant_conv(h) if self.config.use_post_quant_conv else h
        return self.decoder(h).astype(jnp.float32)

    def scale(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B h w Z"]:
        """From the autoencoder's latents to the UNet's, in float32."""
        center, spread = self._statistics
        return (latents.astype(jnp.float32) - center) / spread

    def unscale(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B h w Z"]:
        """From the UNet's latents to the autoencoder's, in float32."""
        center, spread = self._statistics
        return latents.astype(jnp.float32) * spread + center

    @property
    def _statistics(self) -> tuple[Float[Array, "*Z"], Float[Array, "*Z"]]:
        config = self.config
        center = (config.shift_factor or 0.0) if config.latents_mean is None else config.latents_mean
        spread = jnp.array(1.0 if config.latents_std is None else config.latents_std, jnp.float32)
        return jnp.array(center, jnp.float32), spread / config.scaling_factor

    @property
    def _dtype(self) -> jnp.dtype:
        stored = self.decoder.conv_in.kernel.dtype
        return jnp.dtype(jnp.float32) if stored == jnp.float16 and self.config.force_upcast else stored


class Encoder(nnx.Module):
    """From pixels to the moments, before the last 1x1 convolution."""

    remat: bool = False

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels
        levels = zip((channels[0], *channels), channels, strict=False)
        self.conv_in = conv(config.in_channels, channels[0], rngs=rngs)
        self.down_blocks = nnx.List([
            DownBlock(config, inputs, outputs, last=i == len(channels) - 1, rngs=rngs)
            for i, (inputs, outputs) in enumerate(levels)
        ])  # fmt: skip
        self.mid_block = MidBlock(config, rngs=rngs)
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(channels[-1], 2 * config.latent_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w M"]:
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, self.remat)
        return self.conv_out(silu(self.conv_norm_out(x)))


class Decoder(nnx.Module):
    """From latents, after the first 1x1 convolution, to pixels."""

    remat: bool = False

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        channels = config.block_out_channels[::-1]
        levels = zip((channels[0], *channels), channels, strict=False)
        self.conv_in = conv(config.latent_channels, channels[0], rngs=rngs)
        self.mid_block = MidBlock(config, rngs=rngs)
        self.up_blocks = nnx.List([
            UpBlock(config, inputs, outputs, last=i == len(channels) - 1, rngs=rngs)
            for i, (inputs, outputs) in enumerate(levels)
        ])  # fmt: skip
        self.conv_norm_out = GroupNorm(config.norm_num_groups, channels[-1], epsilon=EPSILON, rngs=rngs)
        self.conv_out = conv(channels[-1], config.out_channels, rngs=rngs)

    def __call__(self, x: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        x = self.conv_in(x)
        for block in (self.mid_block, *self.up_blocks[:-1]):
            x = block(x, self.remat)
        end = list(self.up_blocks[-1].resnets), self.conv_norm_out, self.conv_out
        if not self.remat and large.is_end(end, x):
            return large.ended(end, x)
        return self.conv_out(silu(self.conv_norm_out(self.up_blocks[-1](x, self.remat))))


class DownBlock(nnx.Module):
    """A level of the encoder; every level but the last halves the picture."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, *, last: bool, rngs: nnx.Rngs):
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block, rngs)
        if not last:
            self.downsamplers = nnx.List([Downsample(outputs, padding=((0, 1), (0, 1)), rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"], remat: bool = False) -> Float[Array, "B h w D"]:
        for resnet in self.resnets:
            x = _run(resnet, x, remat)
        return self.downsamplers[0](x) if hasattr(self, "downsamplers") else x


class UpBlock(nnx.Module):
    """A level of the decoder, with one residual block more; every level but the last doubles the picture."""

    def __init__(self, config: VAEConfig, inputs: int, outputs: int, *, last: bool, rngs: nnx.Rngs):
        self.resnets = _resnets(config, inputs, outputs, config.layers_per_block + 1, rngs)
        if not last:
            self.upsamplers = nnx.List([Upsample(outputs, rngs=rngs)])

    def __call__(self, x: Float[Array, "B h w C"], remat: bool = False) -> Float[Array, "B H W D"]:
        for resnet in self.resnets:
            x = _run(resnet, x, remat)
        return self.upsamplers[0](x) if hasattr(self, "upsamplers") else x


class MidBlock(nnx.Module):
    """The lowest level: two residual blocks, attention between them."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        width = config.block_out_channels[-1]
        self.resnets = _resnets(config, width, width, 2, rngs)
        if config.mid_block_add_attention:
            self.attentions = nnx.List([PixelAttention(width, groups=config.norm_num_groups, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"], remat: bool = False) -> Float[Array, "B H W C"]:
        x = _run(self.resnets[0], x, remat)
        if hasattr(self, "attentions"):
            x = _run(self.attentions[0], x, remat)
        return _run(self.resnets[1], x, remat)


class PixelAttention(nnx.Module):
    """Every place of a picture attends to every other, by one head of the full width."""

    def __init__(self, width: int, *, groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(groups, width, epsilon=EPSILON, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (linear(width, width, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([linear(width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = self.group_norm(x).reshape(x.shape[0], math.prod(x.shape[1:3]), 1, x.shape[3])
        out = kernels.attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.to_out[0](out).reshape(x.shape)


def _resnets(config: VAEConfig, inputs: int, outputs: int, count: int, rngs: nnx.Rngs) -> nnx.List[ResnetBlock]:
    return nnx.List([
        ResnetBlock(
            outputs if i else inputs, outputs, time=None, groups=config.norm_num_groups, epsilon=EPSILON,
            activation=config.act_fn, rngs=rngs,
        )
        for i in range(count)
    ])  # fmt: skip


def _run(block: ResnetBlock | PixelAttention, x: Array, remat: bool) -> Array:
    return maybe_remat(remat, lambda block, x: block(x))(block, x)
