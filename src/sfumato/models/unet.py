"""The denoising UNet of SD 1.x, 2.x and SDXL (arXiv:2112.10752, arXiv:2307.01952)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.errors import SfumatoError
from sfumato.models.attention import NO_TAPS, Asked, Attention, Heard, Maps, Taps, above, as_taps, below
from sfumato.models.config import EncoderConfig, UNetConfig
from sfumato.models.embeddings import TextEmbedding, TimeEmbedding, sinusoidal
from sfumato.models.layers import GroupNorm, conv, silu
from sfumato.models.merging import Merge
from sfumato.models.unet_blocks import DownBlock, MidBlock, UpBlock
from sfumato.types import Conditioning, Deep, Keys, Merging, Prediction


class Encoder(nnx.Module):
    """The half that the UNet and the ControlNet share: from the latents down to the middle block."""

    remat: bool = False
    """Gradient checkpointing: recompute each block in the backward pass instead of keeping its inner results."""

    def __init__(self, config: EncoderConfig, *, condition: int | None = None, rngs: nnx.Rngs):
        channels, levels = config.block_out_channels, range(len(config.block_out_channels))
        self.conv_in = conv(config.in_channels, channels[0], rngs=rngs)
        self.time_embedding = TimeEmbedding(channels[0], config.time_dim, condition=condition, rngs=rngs)
        if config.addition_embed_type == "text_time":
            width = config.projection_class_embeddings_input_dim or 0
            self.add_embedding = TimeEmbedding(width, config.time_dim, rngs=rngs)
        elif config.addition_embed_type == "text":
            heads = config.addition_embed_type_num_heads
            self.add_embedding = TextEmbedding(config.context_dim(0), config.time_dim, heads, rngs=rngs)
        self.down_blocks = nnx.List([DownBlock(config, level, rngs=rngs) for level in levels])
        if config.mid_block_type is not None:
            self.mid_block = MidBlock(config, rngs=rngs)

    @property
    def dtype(self) -> jnp.dtype:
        """The type that the network computes in: that of its parameters."""
        return self.conv_in.kernel.dtype

    def embed(self, config: EncoderConfig, t: Float[Array, " B"], cond: Conditioning) -> Float[Array, "B M"]:
        """The embedding of the time and of all that is added to it."""
        guidance = cond.guidance if hasattr(self.time_embedding, "cond_proj") else None  # a ControlNet is not told
        waves = {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift}
        emb = self.time_embedding(sinusoidal(t, config.block_out_channels[0], **waves), guidance)
        if config.addition_embed_type == "text":
            return emb + self.add_embedding(cond.context.astype(self.dtype))
        if config.addition_embed_type == "text_time":
            if cond.pooled is None or cond.time_ids is None:
                raise SfumatoError("This is an SDXL network: its conditioning needs pooled text features and time_ids.")
            sizes = sinusoidal(cond.time_ids.reshape(-1), config.addition_time_embed_dim or 0, **waves)
            sizes = sizes.reshape(t.shape[0], -1)
            return emb + self.add_embedding(jnp.concatenate([cond.pooled.astype(jnp.float32), sizes], axis=-1))
        return emb

    def hear(self, context: Float[Array, "B L D"]) -> dict[str, Keys]:
        """What its layers make of a text, by checkpoint path: `Conditioning.heard`, the same in every evaluation."""
        context = context.astype(self.dtype)
        layers = {path: module for path, module in nnx.iter_modules(self) if isinstance(module, Attention)}
        return {".".join(map(str, path)): layer.hear(context) for path, layer in layers.items() if path[-1] == "attn2"}

    def encode(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"], taps: Taps = NO_TAPS
    ) -> tuple[list[Array], Array, Maps]:
        """From the output of `conv_in` to (all skip connections, output of the middle block, attention maps)."""
        skips, maps = self.outside(x, emb, context, taps)
        more, mid, got = self.inside(skips[-1], emb, context, taps)
        return skips + more, mid, maps | got

    def outside(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"],
        taps: Taps = NO_TAPS, layers: int = 1,
    ) -> tuple[list[Array], Maps]:  # fmt: skip
        """The first part of `encode`: the skip connections that the last `layers` on the way up take."""
        name = "down_blocks.0"
        new, got = self.down_blocks[0].layers(x, emb, context, below(taps, name), self.remat, range(layers - 1))
        return [x, *new], above(name, got)

    def inside(
        self, x: Float[Array, "B H W C"], emb: Float[Array, "B M"], context: Float[Array, "B L D"],
        taps: Taps = NO_TAPS, layers: int = 1,
    ) -> tuple[list[Array], Array, Maps]:  # fmt: skip
        """The rest of `encode`, from the last result of `outside`."""
        skips, maps = [x], {}
        for i, block in enumerate(self.down_blocks):
            name, first = f"down_blocks.{i}", 0 if i else layers - 1
            new, got = block(skips[-1], emb, context, below(taps, name), self.remat, first)
            skips, maps = skips + new, maps | above(name, got)
        mid = skips[-1]
        if hasattr(self, "mid_block"):
            mid, got = self.mid_block(mid, emb, context, below(taps, "mid_block"), self.remat)
            maps |= above("mid_block", got)
        return skips[1:], mid, maps


class UNet(Encoder):
    """Predicts noise (or velocity, or the clean latents) from noisy latents, a time and a conditioning."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        super().__init__(config, condition=config.time_cond_proj_dim, rngs=rngs)
        self.config = config
        levels = range(len(config.block_out_channels))
        width = config.block_out_channels[0]
        self.up_blocks = nnx.List([UpBlock(config, level, rngs=rngs) for level in reversed(levels)])
        self.conv_norm_out = GroupNorm(config.norm_num_groups, width, epsilon=config.norm_eps, rngs=rngs)
        self.conv_out = conv(width, config.out_channels, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], t: Float[Array, ""] | Float[Array, " B"], cond: Conditioning,
        taps: Asked | Collection[str] = (),
    ) -> Prediction:  # fmt: skip
        """One evaluation.

        `x` are latents at height H and width W of latent size; `t` is the time step in the training schedule's
        numbering, one for all rows or one a row, and need not be whole; `taps` names the attention layers whose maps
        are wanted, by checkpoint path, or has a function for each that changes its map. A layer whose map is wanted
        merges no tokens (`cond.merging`).
        Raises SfumatoError for channels or taps that the network does not have.
        """
        asked = as_taps(taps)
        self._check(x, cond, asked)
        t = jnp.broadcast_to(t, x.shape[:1])
        context = cond.context.astype(self.dtype)
        emb = self.embed(self.config, t, cond)
        if cond.channels is not None:
            x = jnp.concatenate([x, cond.channels.astype(x.dtype)], axis=-1)
        if cond.merging is not None:
            asked = {**self._merged(cond.merging, (x.shape[1], x.shape[2])), **asked}
        heard = {path: Heard(keys, asked.get(path)) for path, keys in (cond.heard or {}).items()}
        taps = {**asked, **heard}
        reuse = cond.reuse
        layers = 1 if reuse is None else reuse.layers
        own, maps = self.outside(self.conv_in(x.astype(self.dtype)), emb, context, taps, layers)
        skips = self._sum(own, cond.residuals and cond.residuals.down[:layers])

        def deep() -> Deep:
            more, h, maps = self.inside(own[-1], emb, context, taps, layers)
            more = [*skips, *self._sum(more, cond.residuals and cond.residuals.down[layers:])]
            (h,) = self._sum([h], cond.residuals and (cond.residuals.mid,))
            last = len(self.up_blocks) - 1
            for i, block in enumerate(self.up_blocks):
                name, part = f"up_blocks.{i}", slice(-layers) if i == last else slice(None)
                h, got = block(h, more, emb, context, below(taps, name), self.remat, part)
                maps |= above(name, got)
            return h, maps

        had = reuse and reuse.kept
        h, deep_maps = kept = deep() if reuse is None or had is None else jax.lax.cond(reuse.full, deep, lambda: had)
        name = f"up_blocks.{len(self.up_blocks) - 1}"
        h, got = self.up_blocks[-1](h, skips, emb, context, below(taps, name), self.remat, slice(-layers, None))
        out = self.conv_out(silu(self.conv_norm_out(h)))
        out = out.astype(jnp.promote_types(self.dtype, jnp.float32))
        return Prediction(out, maps | deep_maps | above(name, got), kept if reuse else None)

    def attention_paths(self) -> tuple[str, ...]:
        """The checkpoint paths of all attention layers, in the order of the forward pass: what may be tapped."""
        config, paths = self.config, []

        def visit(block: str, layers: int, level: int) -> None:
            stems = (
                f"{block}.attentions.{i}.transformer_blocks.{j}"
                for i in range(layers)
                for j in range(config.depth(level))
            )
            paths.extend(f"{stem}.{kind}" for stem in stems for kind in ("attn1", "attn2"))

        last = len(config.block_out_channels) - 1
        for level, block in enumerate(self.down_blocks):
            visit(f"down_blocks.{level}", len(block.resnets) * hasattr(block, "attentions"), level)
        if hasattr(self, "mid_block"):
            visit("mid_block", len(self.mid_block.attentions), last)
        for i, block in enumerate(self.up_blocks):
            visit(f"up_blocks.{i}", len(block.resnets) * hasattr(block, "attentions"), last - i)
        return tuple(paths)

    def level(self, path: str) -> int:
        """How many times the latents are halved at a layer, by its checkpoint path."""
        last = len(self.config.block_out_channels) - 1
        block, index = path.split(".")[:2]
        return last if block == "mid_block" else int(index) if block == "down_blocks" else last - int(index)

    def _merged(self, merging: Merging, size: tuple[int, int]) -> dict[str, Merge]:
        """What takes the place of taps at the self-attention layers of the highest resolution."""
        levels = {path: self.level(path) for path in self.attention_paths() if path.endswith(".attn1")}
        highest = min(levels.values())
        for _ in range(highest):  # halved, rounding up, or down where there is no padding
            up = bool(self.config.downsample_padding)
            size = (size[0] + up) // 2, (size[1] + up) // 2
        merge = Merge(merging.on, merging.ratio, size)
        return {path: merge for path, level in levels.items() if level == highest}

    def _sum(self, skips: list[Array], residuals: Sequence[Array] | None) -> list[Array]:
        """Skips with their residuals, in the type of the network."""
        if residuals is None:
            return list(skips)
        return [skip + more.astype(self.dtype) for skip, more in zip(skips, residuals, strict=True)]

    def _check(self, x: Array, cond: Conditioning, taps: Taps) -> None:
        extra = 0 if cond.channels is None else cond.channels.shape[-1]
        if x.shape[-1] + extra != self.config.in_channels:
            raise SfumatoError(
                f"This UNet takes {self.config.in_channels} input channels, but the latents have {x.shape[-1]} and the "
                f"conditioning adds {extra}."
            )
        unknown = set(taps) - set(self.attention_paths()) if taps else ()
        if unknown:
            raise SfumatoError(f"This UNet has no attention layer {min(unknown)!r}; see UNet.attention_paths().")
