"""The tiny autoencoders for previews (the TAESD family, github.com/madebyollin/taesd; "AutoencoderTiny").

They are made of convolutions and ReLUs alone and approximate the large autoencoder in a hundredth of its time, taking
and giving latents as the UNet sees them.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.errors import MismatchError, SfumatoError
from sfumato.models.blocks import nearest
from sfumato.models.layers import ACTIVATIONS, GroupNorm, conv

POOL_GROUPS = 4
"""Groups of the normalization in the context branch, and how much wider than the block it is."""


@dc.dataclass(frozen=True)
class TinyVAEConfig:
    """A tiny autoencoder ("AutoencoderTiny"). Encoder stages run down from the pixels, decoder stages up to them."""

    in_channels: int = 3
    out_channels: int = 3
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    act_fn: str = "relu"
    latent_channels: int = 4
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float | int = 3
    """Latents lie within ± this when they are stored as bytes. Kept for the files."""
    latent_shift: float | int = 0.5
    force_upcast: bool = False
    scaling_factor: float | int = 1.0
    shift_factor: float | int = 0.0
    use_midblock_gn: bool = False
    """Blocks of the lowest level have a normalized context branch (TAEF2). Not in the diffusers format."""

    neutral: ClassVar[Mapping[str, object]] = {"upsample_fn": "nearest", "upsampling_scaling_factor": 2}
    ignored: ClassVar[frozenset[str]] = frozenset({"block_out_channels"})

    def __post_init__(self) -> None:
        for half in ("encoder", "decoder"):
            blocks, channels = getattr(self, f"num_{half}_blocks"), getattr(self, f"{half}_block_out_channels")
            if len(blocks) != len(channels):
                raise SfumatoError(
                    f"num_{half}_blocks has {len(blocks)} entries, {half}_block_out_channels {len(channels)}."
                )
        if self.act_fn not in ACTIVATIONS:
            raise SfumatoError(f"act_fn {self.act_fn!r} is not supported, only {', '.join(ACTIVATIONS)} are.")
        if not self.scaling_factor:
            raise SfumatoError("scaling_factor is 0, so no latents could be scaled back.")


class AutoencoderTiny(nnx.Module):
    """Pictures to latents and back, quickly and roughly."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.encoder = TinyEncoder(config, rngs=rngs)
        self.decoder = TinyDecoder(config, rngs=rngs)

    @property
    def factor(self) -> int:
        """Pixels that a latent stands for, along each side."""
        return 2 ** (len(self.config.num_decoder_blocks) - 1)

    def encode(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        """Latents as the UNet sees them, float32. `pixels` lie in [-1, 1]."""
        return (self.encoder(pixels) - self.config.shift_factor) * self.config.scaling_factor

    def decode(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        """The picture of latents as the UNet sees them: float32, about [-1, 1], not clipped."""
        return self.decoder(latents / self.config.scaling_factor + self.config.shift_factor)


class TinyEncoder(nnx.Module):
    """Pixels in [-1, 1] to unscaled latents, float32."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        channels, blocks = config.encoder_block_out_channels, config.num_encoder_blocks
        layers: list[nnx.Module] = [conv(config.in_channels, channels[0], rngs=rngs)]
        for i, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            if i:
                layers.append(conv(channels[i - 1], width, stride=2, bias=False, rngs=rngs))
            pool = config.use_midblock_gn and i == len(blocks) - 1
            layers += [TinyBlock(width, config.act_fn, pool=pool, rngs=rngs) for _ in range(count)]
        self.layers: nnx.List[Any] = nnx.List([*layers, conv(channels[-1], config.latent_channels, rngs=rngs)])

    def __call__(self, pixels: Float[Array, "B H W C"]) -> Float[Array, "B h w Z"]:
        x = ((pixels + 1) / 2).astype(self.layers[0].kernel.dtype)
        return _chain(self.layers, x).astype(jnp.float32)


class TinyDecoder(nnx.Module):
    """Unscaled latents to pixels, float32. Latents are first bent into (-3, 3) by 3 tanh(x / 3)."""

    def __init__(self, config: TinyVAEConfig, *, rngs: nnx.Rngs):
        channels, blocks = config.decoder_block_out_channels, config.num_decoder_blocks
        layers: list[nnx.Module] = [conv(config.latent_channels, channels[0], rngs=rngs), Activation(config.act_fn)]
        for i, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            if i:
                layers += [Double(), conv(channels[i - 1], width, bias=False, rngs=rngs)]
            pool = config.use_midblock_gn and i == 0
            layers += [TinyBlock(width, config.act_fn, pool=pool, rngs=rngs) for _ in range(count)]
        self.layers: nnx.List[Any] = nnx.List([*layers, conv(channels[-1], config.out_channels, rngs=rngs)])

    def __call__(self, latents: Float[Array, "B h w Z"]) -> Float[Array, "B H W C"]:
        x = (jnp.tanh(latents / 3) * 3).astype(self.layers[0].kernel.dtype)
        return _chain(self.layers, x).astype(jnp.float32) * 2 - 1


class TinyBlock(nnx.Module):
    """Three convolutions beside a skip connection, and a ReLU after their sum.

    With `pool`, x becomes first x + P(x), where P widens each place, normalizes over the whole picture and comes back:
    the one part of the network that sees more than its neighbourhood.
    """

    def __init__(self, width: int, activation: str, *, pool: bool, rngs: nnx.Rngs):
        a, b, c = (conv(width, width, rngs=rngs) for _ in range(3))
        self.conv = nnx.List([a, Activation(activation), b, Activation(activation), c])
        if pool:
            wide = POOL_GROUPS * width
            self.pool = nnx.List([
                conv(width, wide, 1, bias=False, rngs=rngs), GroupNorm(POOL_GROUPS, wide, epsilon=1e-5, rngs=rngs),
                Activation("relu"), conv(wide, width, 1, bias=False, rngs=rngs),
            ])  # fmt: skip

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        if hasattr(self, "pool"):
            x = x + _chain(self.pool, x)
        return jax.nn.relu(x + _chain(self.conv, x))


class Activation(nnx.Module):
    """An activation in its place of a numbered list."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, x: Array) -> Array:
        return ACTIVATIONS[self.name](x)


class Double(nnx.Module):
    """Twice the height and width, by nearest neighbours."""

    def __call__(self, x: Float[Array, "B h w C"]) -> Float[Array, "B H W C"]:
        return nearest(x, (2 * x.shape[1], 2 * x.shape[2]))


def _chain(layers: nnx.List, x: Array) -> Array:
    for layer in layers:
        x = layer(x)
    return x


def original_tiny_names(keys: Iterable[str]) -> dict[str, str]:
    """Our keys for those of one file in the original layout, where encoder and decoder are files of their own.

    A file whose layers begin at number 0 is an encoder; a decoder's begin at 1, after a layer without numbers that
    bends the latents. Raises MismatchError for keys of another layout.
    """
    numbered = {key: re.fullmatch(r"(\d+)\.(.+)", key) for key in keys}
    strange = [key for key, match in numbered.items() if match is None]
    if strange or not numbered:
        raise MismatchError(
            f"Not a tiny autoencoder in its original layout: {strange[0]!r} is no numbered layer."
            if strange else "Not a tiny autoencoder: the file has no tensors."
        )  # fmt: skip
    layers = {key: (int(match[1]), match[2]) for key, match in numbered.items() if match}
    half, first = ("encoder", 0) if any(number == 0 for number, _ in layers.values()) else ("decoder", 1)
    return {key: f"{half}.layers.{number - first}.{rest}" for key, (number, rest) in layers.items()}


def infer_tiny_config(shapes: Mapping[str, tuple[int, ...]]) -> TinyVAEConfig:
    """The configuration that fits tensors of these shapes (by our keys, convolutions OIHW), of both halves or of one.

    What a missing half cannot tell is taken from the other. Raises MismatchError if this is no tiny autoencoder.
    """
    encoder, decoder = (_half(shapes, name) for name in ("encoder", "decoder"))
    encoder = encoder or (decoder and decoder.reversed())
    decoder = decoder or (encoder and encoder.reversed())
    if encoder is None or decoder is None:
        raise MismatchError("Not a tiny autoencoder: there are no layers of an encoder or of a decoder.")
    return TinyVAEConfig(
        in_channels=encoder.inputs, out_channels=decoder.outputs, latent_channels=decoder.inputs,
        encoder_block_out_channels=encoder.widths, decoder_block_out_channels=decoder.widths,
        num_encoder_blocks=encoder.blocks, num_decoder_blocks=decoder.blocks,
        use_midblock_gn=any(".pool." in key for key in shapes),
    )  # fmt: skip


class _Half(NamedTuple):
    inputs: int
    outputs: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def reversed(self) -> _Half:
        return _Half(self.outputs, self.inputs, self.widths[::-1], self.blocks[::-1])


def _half(shapes: Mapping[str, tuple[int, ...]], name: str) -> _Half | None:
    """What the shapes tell of the encoder or the decoder: each stage begins with a convolution, then come blocks."""
    numbered = [(re.fullmatch(rf"{name}\.layers\.(\d+)\.(conv\.0\.)?weight", key), key) for key in shapes]
    found = sorted((int(match[1]), bool(match[2]), key) for match, key in numbered if match)
    plain = [(number, key) for number, block, key in found if not block]
    if not plain:
        return None
    if len(plain) < 2 or any(f"{name}.layers.{number}.bias" in shapes for number, _ in plain[1:-1]):
        raise MismatchError(f"The {name} is laid out in another way than the tiny autoencoders of the TAESD family.")
    return _Half(
        inputs=shapes[plain[0][1]][1], outputs=shapes[plain[-1][1]][0],
        widths=tuple(shapes[key][0] for _, key in plain[:-1]),
        blocks=tuple(
            sum(block and start < number < stop for number, block, _ in found)
            for (start, _), (stop, _) in pairwise(plain)
        ),
    )  # fmt: skip
