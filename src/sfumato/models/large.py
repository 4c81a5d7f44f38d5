"""Blocks of large pictures on a processor.

There a block's convolutions take most of the time, and passes over the picture between them most of the rest, and of
the memory: each would be read and written to be normalized, to be put in order, to have a bias and what is skipped
added. All of that is done here where the convolution has a piece of the picture in the cache anyway. So between two
convolutions there is one array, and it is read for its mean, its variance and by the next convolution.

Where a block halves the channels, its input is the largest array of an autoencoder. There the first convolution and the
one around the block write their results, side by side, over what they were made of. Where nothing but such pictures
follows, at the end of a decoder, all further ones do, each in the half that the other one is not read from.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Shaped

from sfumato.models.kernels import winograd
from sfumato.models.kernels.convolution import LARGEST, form
from sfumato.models.kernels.normalization import MANY, factors, moments_of
from sfumato.models.kernels.order import once, together
from sfumato.models.kernels.packed import packed, unpacked
from sfumato.models.kernels.products import multiplied_in
from sfumato.models.kernels.winograd import Prologue
from sfumato.models.layers import ACTIVATIONS, keeps_size, precise, silu

Piece = Callable[[Array, Array, Sequence[int]], Float[Array, "b h w O"]]
"""Of the first picture, the first line and a shape: what is added to a piece of a result."""

End = tuple[Sequence[Any], Any, Any]
"""Residual blocks, a normalization, and a convolution, with which a network ends."""

LINES = 32
"""Of a picture, as many at once are overwritten."""

ORIGIN = np.zeros(2, np.uint32)
"""The first column and the first channel; without a sign: nothing is computed for places below zero."""


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
    before, around = _normalizing(block.norm1, x, act), getattr(block, "conv_shortcut", lambda part: part)
    if _halves(block, x):
        both = _side_by_side(block, x, before, added)
        skip = _skipping(lambda part: part[..., part.shape[3] // 2 :], both)
        return _convolved(block.conv2, both, _normalizing(block.norm2, both, act), [skip])
    h = _convolved(block.conv1, x, before, added)
    return _convolved(block.conv2, h, _normalizing(block.norm2, h, act), [_skipping(around, x)])


def _halves(block: Any, x: Float[Array, "B H W C"]) -> bool:
    return hasattr(block, "conv_shortcut") and x.shape[3] == 2 * block.conv2.kernel.shape[2]


def is_end(end: End, x: Float[Array, "B H W C"]) -> bool:
    """Whether `ended` computes these: large blocks, of which the first halves the channels and no other changes them,
    and layers as they are built."""
    (block, *others), _, layer = end
    if not is_large(block, x) or not _halves(block, x) or not isinstance(layer, nnx.Conv) or not keeps_size(layer):
        return False
    half = x[..., : x.shape[3] // 2]
    return all(is_large(each, half) and not hasattr(each, "conv_shortcut") for each in others)


@jax.custom_vjp
def ended(end: End, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
    """Residual blocks, a normalization, SiLU and a convolution, one after the other: their result, and their
    gradients."""
    return lax.platform_dependent(end, x, cpu=_ended, default=_one_by_one)


def _one_by_one(end: End, x: Array) -> Array:
    blocks, norm, layer = end
    for block in blocks:
        x = block.plainly(x, None)
    return layer(silu(norm(x)))


ended.defvjp(functools.partial(jax.vjp, _one_by_one), lambda pull, gradient: pull(gradient))


def _ended(end: End, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
    (block, *others), norm, layer = end
    act, half = ACTIVATIONS[block.activation], x.shape[3] // 2
    both = _side_by_side(block, x, _normalizing(block.norm1, x, act), [])
    both = _convolved(block.conv2, both, _normalizing(block.norm2, both, act), over=half, keeping=True)
    for block in others:
        act = ACTIVATIONS[block.activation]
        both = _convolved(block.conv1, both, _normalizing(block.norm1, both, act, half), reads=half, over=0)
        both = _convolved(block.conv2, both, _normalizing(block.norm2, both, act), over=half, keeping=True)
    return _by_bands(layer, both, _normalizing(norm, both, silu, half), half)


def _convolved(
    layer: nnx.Conv, x: Float[Array, "B H W C"], before: Prologue, added: Iterable[Piece] = (), *,
    reads: int = 0, over: int | None = None, keeping: bool = False,
) -> Float[Array, "B H W O2"]:  # fmt: skip
    """The layer on what `before` makes of `x`, and what is `added` to it. It `reads` and writes `over` channels of `x`
    as `winograd.convolve` does; `keeping`, it adds to what lies there."""
    filtering = _filtering(x, layer)
    assert filtering is not None

    def after(made: Float[Array, "b h w O"], first: Array, line: Array, lying: Any) -> Float[Array, "b h w O"]:
        return _with(made, layer, [*added, lambda *_: lying] if keeping else added, first, line)

    kernel = layer.kernel[...].astype(x.dtype)
    return winograd.convolve(x, kernel, *filtering, before, after, reads=reads, over=over)


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
    rows = _band(height, kind.m)

    def one(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        (picture, above), (first, line) = state, _start(number, height, rows)
        part, below = (_cut(picture, first, at, lines) for at, lines in ((line, rows), (line + rows, 1)))
        wide = _bordered([above, part, below], before, first, line, x)
        made = _with(winograd.filtered(wide, kernel, kind, size)[:, 1:-1], block.conv1, added, first, line)
        both = packed(jnp.concatenate([made, block.conv_shortcut(unpacked(part, x.dtype))], -1))
        both, last = together((both, part[:, -1:]))
        return lax.dynamic_update_slice(picture, both, (first, line, *ORIGIN)), last

    start = packed(x), jnp.zeros((1, 1, width, channels), packed(x).dtype)
    return unpacked(lax.fori_loop(0, batch * height // rows, one, start)[0], x.dtype)


def _by_bands(layer: nnx.Conv, x: Float[Array, "B H W C"], before: Prologue, reads: int) -> Float[Array, "B H W O"]:
    """The layer on what `before` makes of the channels of `x` from one on, some lines at a time."""
    (batch, height, width, _), (*_, inputs, outputs) = x.shape, layer.kernel.shape
    rows, picture = _band(height), packed(x)

    def one(number: Array, out: Shaped[Array, "B H W O"]) -> Shaped[Array, "B H W O"]:
        first, line = _start(number, height, rows)
        places = (jnp.maximum(line, 1) - 1, 1), (line, rows), (line + rows, 1)
        parts = [_cut(picture, first, at, lines, slice(reads, reads + inputs)) for at, lines in places]
        made = layer(_bordered(parts, before, first, line, x))[:, 1:-1]
        return lax.dynamic_update_slice(out, packed(made), (first, line, *ORIGIN))

    out = jnp.zeros((batch, height, width, outputs), picture.dtype)
    return unpacked(lax.fori_loop(0, batch * height // rows, one, out), x.dtype)


def _band(height: int, of: int = 1) -> int:
    """How many lines of a picture are computed at once: `LINES` at most, a multiple `of` some, and all bands alike."""
    return next(each for each in range(LINES, 0, -1) if height % each == 0 and each % of == 0)


def _start(number: Array, height: int, rows: int) -> tuple[Array, Array]:
    """The picture and the line where a band begins."""
    number, bands = jnp.asarray(number, jnp.uint32), height // rows
    return number // bands, number % bands * rows


def _cut(
    picture: Shaped[Array, "B H W C"], first: Array, line: Array, lines: int, channels: slice = slice(None)
) -> Shaped[Array, "1 h W c"]:
    """Lines of a picture, of those that there are the last ones."""
    start, stop, _ = channels.indices(picture.shape[3])
    place = first, jnp.minimum(line, picture.shape[1] - lines), ORIGIN[0], jnp.uint32(start)
    return lax.dynamic_slice(picture, place, (1, lines, picture.shape[2], stop - start))


def _bordered(
    parts: Sequence[Shaped[Array, "1 _ W C"]], before: Prologue, first: Array, line: Array, x: Float[Array, "B H W D"]
) -> Float[Array, "1 rows W I"]:
    """What `before` makes of a band of `x` and of the lines above and below it, zeros outside of the picture."""
    wide = before(unpacked(jnp.concatenate(parts, 1), x.dtype), first)
    lines = line + jnp.arange(wide.shape[1], dtype=jnp.uint32)
    inside = (lines > 0) & (lines <= x.shape[1])
    return jnp.where(inside[None, :, None, None], wide, 0)


def _normalizing(norm: Any, x: Float[Array, "B H W C"], act: Callable[[Array], Array], reads: int = 0) -> Prologue:
    """Normalization of as many channels of `x` as it is for, from one on, and activation: of a piece of them."""
    found = moments_of(x, norm.groups, reads, len(norm.scale[...]))
    mean, factor = factors(found, norm.scale[...], norm.epsilon)
    mean, factor = _each(mean[:, :, None]), _each(factor[:, :, None])

    def normalize(part: Float[Array, "b h w C"], first: Array) -> Float[Array, "b h w C"]:
        center, wide = (each(first, first, part.shape) for each in (mean, factor))
        y = act((precise(part) - center) * wide + precise(norm.bias[...]))
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
