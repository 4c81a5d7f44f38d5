"""Attention layers of the UNet, and how their attention maps are asked for.

A *tap* belongs to the checkpoint path of an attention layer, such as
``mid_block.attentions.0.transformer_blocks.0.attn2``. It is a function of the attention map that gives the map to go on
with: the same one (`unchanged`) for who only wants to look, another for who wants to change what the layer does. Every
module is called with the taps below it, by paths relative to itself, and returns the maps as they were before, beside
its output; a layer that is not tapped never forms its map as a whole.
"""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels
from sfumato.models.layers import GroupNorm, Identity, conv, gelu, layer_norm, linear, precise
from sfumato.models.merging import Merge
from sfumato.types import Keys

Map = Float[Array, "B N Q K"]
Tap = Callable[[Map], Map]
Asked = Mapping[str, Tap | Merge]
"""Taps by path; in the place of one there may be a `Merge`, which goes round the layer and gives no map."""


@dc.dataclass(frozen=True)
class Heard:
    """The keys and values of a layer, which need not be made any more, and its tap."""

    keys: Keys
    tap: Tap | Merge | None = None


Taps = Mapping[str, Tap | Merge | Heard]
"""What modules are called with."""
Maps = dict[str, Float[Array, "B _ _ _"]]
NO_TAPS: Taps = {}


def unchanged(probabilities: Map) -> Map:
    """The tap that only looks."""
    return probabilities


def identity(probabilities: Map) -> Map:
    """The tap of a self-attention layer that makes every position attend to itself alone."""
    return jnp.broadcast_to(jnp.eye(probabilities.shape[-1], dtype=probabilities.dtype), probabilities.shape)


def as_taps(paths: Asked | Collection[str]) -> Asked:
    """Taps that only look for mere paths."""
    return paths if isinstance(paths, Mapping) else dict.fromkeys(paths, unchanged)


def below(taps: Taps, name: str) -> Taps:
    """The taps inside the submodule `name`, by their paths relative to it."""
    return {path[len(name) + 1 :]: tap for path, tap in taps.items() if path.startswith(name + ".")}


def above(name: str, maps: Mapping[str, Array]) -> Maps:
    """The maps of submodule `name`, by their paths relative to its parent."""
    return {f"{name}.{path}": value for path, value in maps.items()}


def maybe_remat(remat: bool, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, recomputed in the backward pass instead of remembered if `remat` (gradient checkpointing).

    XLA's CPU compiler undoes it unless `compiler_options=sfumato.compiler.BARRIERS`.
    """
    return jax.checkpoint(call) if remat else call


class Attention(nnx.Module):
    """Multi-head attention (arXiv:1706.03762, section 3.2.2): to itself, or to a context of width `context`."""

    def __init__(self, width: int, heads: int, *, context: int | None = None, rngs: nnx.Rngs):
        self.heads = heads
        self.to_q = linear(width, width, bias=False, rngs=rngs)
        self.to_k = linear(context or width, width, bias=False, rngs=rngs)
        self.to_v = linear(context or width, width, bias=False, rngs=rngs)
        self.to_out = nnx.List([linear(width, width, rngs=rngs)])

    def __call__(
        self, x: Float[Array, "B Q D"], context: Float[Array, "B K F"] | None = None,
        tap: Tap | Merge | Heard | None = None,
    ) -> tuple[Float[Array, "B Q D"], Float[Array, "B N Q K"] | None]:  # fmt: skip
        keys = None
        if isinstance(tap, Heard):
            keys, tap = tap.keys, tap.tap
        if isinstance(tap, Merge):
            return tap(lambda x: self(x, context, keys and Heard(keys))[0], x), None
        keys = self.hear(x if context is None else context) if keys is None else keys
        q, k, v = (self._split(y) for y in (self.to_q(x), *keys))
        if tap is None:
            probabilities, out = None, kernels.attention(q, k, v)
        else:
            probabilities = kernels.attention_map(q, k)
            if tap is unchanged:
                out = kernels.attention(q, k, v)  # to the last bit what it is when nobody looks
            else:
                # The identity gives the values as they are, and of large maps it would take gigabytes.
                out = v if tap is identity else kernels.weigh(tap(probabilities), v)
        return self.to_out[0](out.reshape(x.shape)), probabilities

    def hear(self, context: Float[Array, "B L F"]) -> Keys:
        """What it makes of that which it attends to."""
        return self.to_k(context), self.to_v(context)

    def _split(self, y: Float[Array, "B L D"]) -> Float[Array, "B L N d"]:
        return y.reshape(*y.shape[:2], self.heads, -1)


class GEGLU(nnx.Module):
    """A linear layer gated by the GELU of another (arXiv:2002.05202, eq. 6)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.proj = linear(inputs, 2 * outputs, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B F"]:
        both = self.proj(x)
        value, gate = jnp.split(precise(both), 2, axis=-1)
        return (value * gelu(gate)).astype(both.dtype)


class FeedForward(nnx.Module):
    """Two layers with four times the width between them; `net.1` is the place of dropout."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(width, 4 * width, rngs=rngs), Identity(), linear(4 * width, width, rngs=rngs)])

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nnx.Module):
    """Self-attention, attention to the text, feed-forward, each normalized first and added."""

    def __init__(self, width: int, heads: int, context: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(width, rngs=rngs)
        self.attn1 = Attention(width, heads, rngs=rngs)
        self.norm2 = layer_norm(width, rngs=rngs)
        self.attn2 = Attention(width, heads, context=context, rngs=rngs)
        self.norm3 = layer_norm(width, rngs=rngs)
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B Q D"], context: Float[Array, "B K F"], taps: Taps = NO_TAPS
    ) -> tuple[Float[Array, "B Q D"], Maps]:
        own, own_map = self.attn1(self.norm1(x), tap=taps.get("attn1"))
        x = x + own
        text, text_map = self.attn2(self.norm2(x), context, tap=taps.get("attn2"))
        x = x + text
        maps = {"attn1": own_map, "attn2": text_map}
        x = x + kernels.in_blocks(self.ff, self.norm3(x))
        return x, {name: value for name, value in maps.items() if value is not None}


class Transformer(nnx.Module):
    """A stack of transformer blocks over the positions of a picture (arXiv:2112.10752, appendix E.2.1)."""

    def __init__(
        self, width: int, heads: int, context: int, *, depth: int, groups: int, use_linear: bool, rngs: nnx.Rngs
    ):
        self.norm = GroupNorm(groups, width, epsilon=1e-6, rngs=rngs)
        self.proj_in = linear(width, width, rngs=rngs) if use_linear else conv(width, width, 1, rngs=rngs)
        self.transformer_blocks = nnx.List([TransformerBlock(width, heads, context, rngs=rngs) for _ in range(depth)])
        self.proj_out = linear(width, width, rngs=rngs) if use_linear else conv(width, width, 1, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B H W C"], context: Float[Array, "B K F"], taps: Taps = NO_TAPS, remat: bool = False
    ) -> tuple[Float[Array, "B H W C"], Maps]:
        h, maps = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1]), {}
        for i, block in enumerate(self.transformer_blocks):
            name = f"transformer_blocks.{i}"
            inner = below(taps, name)
            call = maybe_remat(remat, lambda block, h, context, inner=inner: block(h, context, inner))
            h, got = call(block, h, context)
            maps |= above(name, got)
        return x + self.proj_out(h.reshape(x.shape)), maps
