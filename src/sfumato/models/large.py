"""Blocks of large pictures on a processor.

There a block's convolutions take most of the time, and passes over the picture between them most of the rest, and of
the memory: each would be read and written to be normalized, to be put in order, to have a bias and what is skipped
added. All of that is done here where the convolution has a piece of the picture in the cache anyway. So between two
convolutions there is one array, and it is read for its mean, its variance and by the next convolution.
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
from sfumato.models.kernels.packed import packed, unpacked
from sfumato.models.kernels.winograd import Prologue
from sfumato.models.layers import ACTIVATIONS, keeps_size, precise

Piece = Callable[[Array, Array, Sequence[int]], Float[Array, "b h w O"]]
"""Of the first picture, the first line and a shape: what is added to a piece of a result."""


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
    h = _convolved(block.conv1, x, _normalizing(block.norm1, x, act), added)
    return _convolved(block.conv2, h, _normalizing(block.norm2, h, act), [_skipping(block, x)])


def _convolved(
    layer: nnx.Conv, x: Float[Array, "B H W I"], before: Prologue, added: Iterable[Piece]
) -> Float[Array, "B H W O"]:
    """The layer on what `before` makes of `x`, and what is `added` to it."""
    filtering = _filtering(x, layer)
    assert filtering is not None
    added = [*added, *([] if layer.bias is None else [_each(layer.bias[...][None, None, None])])]

    def after(made: Float[Array, "b h w O"], first: Array, line: Array) -> Float[Array, "b h w O"]:
        pieces = [piece(first, line, made.shape) for piece in added]
        return sum(map(precise, pieces), precise(made)).astype(made.dtype)

    return winograd.convolve(x, layer.kernel[...].astype(x.dtype), *filtering, before, after)


def _normalizing(norm: Any, x: Float[Array, "B H W C"], act: Callable[[Array], Array]) -> Prologue:
    """Normalization and activation."""
    mean, factor = factors(moments(x, norm.groups), norm.scale[...], norm.epsilon)
    mean, factor = _each(mean[:, :, None]), _each(factor[:, :, None])

    def normalize(part: Float[Array, "b h w C"], first: Array) -> Float[Array, "b h w C"]:
        center, wide = (each(first, first, part.shape) for each in (mean, factor))
        return act((precise(part) - center) * wide + precise(norm.bias[...])).astype(part.dtype)

    return normalize


def _skipping(block: Any, x: Float[Array, "B H W C"]) -> Piece:
    """What goes around the block: the picture, or a convolution of 1 x 1 of it."""
    picture = packed(x)

    def skip(first: Array, line: Array, shape: Sequence[int]) -> Float[Array, "b h w O"]:
        zero = jnp.zeros_like(first)
        part = lax.dynamic_slice(picture, (first, line, zero, zero), (*shape[:3], x.shape[3]))
        part = unpacked(part, x.dtype)
        return block.conv_shortcut(part) if hasattr(block, "conv_shortcut") else part

    return skip


def _each(values: Float[Array, "B 1 1 C"]) -> Piece:
    """Values that are the same at all places of a picture; of one for all pictures, or of each."""

    def pick(first: Array, line: Array, shape: Sequence[int]) -> Float[Array, "b 1 1 C"]:
        return values if len(values) in (1, shape[0]) else lax.dynamic_slice_in_dim(values, first, shape[0])

    return pick
