"""Blocks of large pictures on a processor.

There a block's convolutions take most of the time, and passes over the picture between them most of the rest, and of
the memory: each would be read and written to be normalized, to be put in order, to have a bias and what is skipped
added. All of that is done here where the convolution has a piece of the picture in the cache anyway. So between two
convolutions there is one array, and it is read for its mean, its variance and by the next convolution.

Where a block halves the channels, its input is the largest array of an autoencoder. There the first convolution and the
one around the block write their results, side by side, over what they were made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels import winograd
from sfumato.models.kernels.convolution import LARGEST, form
from sfumato.models.kernels.normalization import MANY, factors, moments
from sfumato.models.kernels.order import once, together
from sfumato.models.kernels.packed import packed, unpacked
from sfumato.models.kernels.products import multiplied_in
from sfumato.models.kernels.winograd import Prologue
from sfumato.models.layers import ACTIVATIONS, keeps_size, precise

Piece = Callable[[Array, Array, Sequence[int]], Float[Array, "b h w O"]]
"""Of the first picture, the first line and a shape: what is added to a piece of a result."""

LINES = 32
"""Of a picture, as many at once are overwritten."""


def is_large(block: Any, x: Float[Array, "B H W C"]) -> bool:
    """Whether a residual block computes this picture so: layers as they are built, and whole tiles."""
    layers = [block.conv1, block.conv2, *([block.conv_shortcut] if hasattr(block, "conv_shortcut") else [])]
    if x.shape[1] * x.shape[2] < MANY or not all(isinstance(layer, nnx.Conv) for layer in layers):
        return False
    return all(_filtering(x, layer) is not None for layer in (block.conv1, block.conv2))


def _filtering(x: Float[Array, "B H W C"], layer: nnx.Conv) -> tuple[winograd.Form, int] | None:
    """By which form the layer's convolution is filtered and in what blocks, if it is, in whole tiles."""
    kernel, (batch, height, width, _) = layer.kernel, x.shape
    if not keeps_size(layer) or batch * height * width * max(kernel.shape[2:]) > LARGEST:
        return None
    found: Any = form((batch, height, width), kernel.shape, x.dtype)
    settings = getattr(found, "keywords", {})
    if "form" not in settings or height % settings["form"].m or width % settings["form"].m:
        return None
    return settings["form"], settings["block"]


@jax.custom_vjp
def residual(block: Any, x: Float[Array, "B H W I"], emb: Float[Array, "B M"] | None) -> Float[Array, "B H W O"]:
    """`block.plainly(x, emb)`, whose gradients it has."""
    return lax.platform_dependent(block, x, emb, cpu=_residual, default=_plainly)


def _plainly(block: Any, x: Array, emb: Array | None) -> Array:
    return block.plainly(x, emb)


residual.defvjp(functools.partial(jax.vjp, _plainly), lambda pull, gradient: pull(gradient))


def _residual(block: Any, x: Float[Array, "B H W I"], emb: Float[Array, "B M"] | None) -> Float[Array, "B H W O"]:
    act = ACTIVATIONS[block.activation]
    added = [] if emb is None else [_each(block.time_emb_proj(act(emb))[:, None, None])]
    before, width = _normalizing(block.norm1, x, act), block.conv2.kernel.shape[2]
    around = getattr(block, "conv_shortcut", lambda part: part)
    if hasattr(block, "conv_shortcut") and x.shape[3] == 2 * width:
        both = _side_by_side(block, x, before, added)
        skip = _skipping(lambda part: part[..., width:], both)
        return _convolved(block.conv2, both, _normalizing(block.norm2, both, act), [skip])
    h = _convolved(block.conv1, x, before, added)
    return _convolved(block.conv2, h, _normalizing(block.norm2, h, act), [_skipping(around, x)])


def _convolved(
    layer: nnx.Conv, x: Float[Array, "B H W I"], before: Prologue, added: Iterable[Piece]
) -> Float[Array, "B H W O"]:
    """The layer on what `before` makes of `x`, and what is `added` to it."""
    filtering = _filtering(x, layer)
    assert filtering is not None

    def after(made: Float[Array, "b h w O"], first: Array, line: Array) -> Float[Array, "b h w O"]:
        return _with(made, layer, added, first, line)

    return winograd.convolve(x, layer.kernel[...].astype(x.dtype), *filtering, before, after)


def _with(
    made: Float[Array, "b h w O"], layer: nnx.Conv, added: Iterable[Piece], first: Array, line: Array
) -> Float[Array, "b h w O"]:
    """A piece of a result with what is `added` to it, and the layer's bias."""
    added = [*added, *([] if layer.bias is None else [_each(layer.bias[...][None, None, None])])]
    pieces = [piece(first, line, made.shape) for piece in added]
    return sum(map(precise, pieces), precise(made)).astype(made.dtype)


def _side_by_side(
    block: Any, x: Float[Array, "B H W I"], before: Prologue, added: Sequence[Piece]
) -> Float[Array, "B H W I"]:
    """The first convolution's results, and beside them those of the convolution around the block, where `x` lay: some
    lines at a time, with the line above them that was there before."""
    filtering, (batch, height, width, channels) = _filtering(x, block.conv1), x.shape
    assert filtering is not None
    kind, size = filtering
    kernel = winograd.moved(block.conv1.kernel[...].astype(jnp.float32) * once(x), kind, multiplied_in(x.dtype))
    rows = next(each for each in range(LINES, 0, -1) if height % each == 0 and each % kind.m == 0)
    bands, zero = height // rows, jnp.uint32(0)

    def one(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        (picture, above), number = state, jnp.asarray(number, zero.dtype)
        first, line = number // bands, number % bands * rows
        part = lax.dynamic_slice(picture, (first, line, zero, zero), (1, rows, width, channels))
        below = jnp.minimum(line + rows, height - 1)
        below = lax.dynamic_slice(picture, (first, below, zero, zero), (1, 1, width, channels))
        wide = before(unpacked(jnp.concatenate([above, part, below], 1), x.dtype), first)
        inside = jnp.arange(rows + 2)
        inside = ((inside > 0) | (line > 0)) & ((inside <= rows) | (line + rows < height))
        wide = jnp.where(inside[None, :, None, None], wide, 0)
        made = _with(winograd.filtered(wide, kernel, kind, size)[:, 1:-1], block.conv1, added, first, line)
        both = packed(jnp.concatenate([made, block.conv_shortcut(unpacked(part, x.dtype))], -1))
        both, last = together((both, part[:, -1:]))
        return lax.dynamic_update_slice(picture, both, (first, line, zero, zero)), last

    start = packed(x), jnp.zeros((1, 1, width, channels), packed(x).dtype)
    return unpacked(lax.fori_loop(0, batch * bands, one, start)[0], x.dtype)


def _normalizing(norm: Any, x: Float[Array, "B H W C"], act: Callable[[Array], Array]) -> Prologue:
    """Normalization and activation, of the first channels of `x` if it has more than that is for."""
    width = len(norm.scale[...])
    mean, variance = (each[..., :width] for each in moments(x, norm.groups * x.shape[3] // width))
    mean, factor = factors((mean, variance), norm.scale[...], norm.epsilon)
    mean, factor = _each(mean[:, :, None]), _each(factor[:, :, None])

    def normalize(part: Float[Array, "b h w C"], first: Array) -> Float[Array, "b h w N"]:
        center, wide = (each(first, first, part.shape) for each in (mean, factor))
        y = act((precise(part[..., :width]) - center) * wide + precise(norm.bias[...]))
        return y.astype(part.dtype)

    return normalize


def _skipping(around: Callable[[Array], Array], x: Float[Array, "B H W C"]) -> Piece:
    """What goes around the block: what that makes of the picture."""
    picture = packed(x)

    def skip(first: Array, line: Array, shape: Sequence[int]) -> Float[Array, "b h w O"]:
        zero = jnp.zeros_like(first)
        part = lax.dynamic_slice(picture, (first, line, zero, zero), (*shape[:3], x.shape[3]))
        return around(unpacked(part, x.dtype))

    return skip


def _each(values: Float[Array, "B 1 1 C"]) -> Piece:
    """Values that are the same at all places of a picture; of one for all pictures, or of each."""

    def pick(first: Array, line: Array, shape: Sequence[int]) -> Float[Array, "b 1 1 C"]:
        return values if len(values) in (1, shape[0]) else lax.dynamic_slice_in_dim(values, first, shape[0])

    return pick
