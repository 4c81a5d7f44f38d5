"""The numerical kernels, chosen in this one place; the layers receive them as arguments.

Every kernel accumulates in float32 whatever it is fed and returns the type it was given: half-precision sums of
thousands of terms lose the picture, and on CPU the float32-accumulating bfloat16 product is also the faster one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

QUERY_BLOCK = 1024
"""Queries handled at once when an attention map would be large: the map of a block stays in the cache."""

BLOCKED_FROM = 2**21
"""Attention maps (one head, one picture) of more entries than this are made block by block."""


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, precision: Any = None, **kwargs: Any) -> Array:
    """`jax.lax.dot_general` with float32 (or better) accumulation and the result in the type of `lhs`."""
    kwargs["preferred_element_type"] = jnp.promote_types(lhs.dtype, jnp.float32)
    return lax.dot_general(lhs, rhs, dimension_numbers, precision=precision, **kwargs).astype(lhs.dtype)


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **kwargs: Any) -> Array:
    """`jax.lax.conv_general_dilated`; the type of `lhs` is kept."""
    return lax.conv_general_dilated(lhs, rhs, window_strides, padding, **kwargs).astype(lhs.dtype)


def group_norm(
    x: Float[Array, "B *space C"], scale: Float[Array, " C"], bias: Float[Array, " C"], groups: int, epsilon: float
) -> Float[Array, "B *space C"]:
    """Group normalization (arXiv:1803.08494, eq. 1) over space and the channels of a group, in float32 or better.

    Each mean is taken over space first and then over the channels of a group: in this order the compiler needs no
    second copy of `x`, which matters for the gigabytes of the autoencoder's last layers.
    """
    batch, channels = x.shape[0], x.shape[-1]
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(batch, -1, channels)

    def mean(values: Float[Array, "B S C"]) -> Float[Array, "B 1 C"]:
        means = values.mean(1).reshape(batch, groups, -1).mean(-1)
        return means.repeat(channels // groups, axis=-1)[:, None]

    y = y - mean(y)
    y = y * (lax.rsqrt(mean(y**2) + epsilon) * scale.astype(y.dtype)) + bias.astype(y.dtype)
    return y.reshape(x.shape).astype(x.dtype)


def attention_map(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], mask: Float[Array, "#B #N #Q K"] | None = None
) -> Float[Array, "B N Q K"]:
    """softmax(q k^T / sqrt(D) + mask), the attention probabilities, in float32 (arXiv:1706.03762, eq. 1)."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("bqnd,bknd->bnqk", q, k, preferred_element_type=wide) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits if mask is None else logits + mask, axis=-1)


def attention(
    q: Float[Array, "B Q N D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    mask: Float[Array, "#B #N #Q K"] | None = None,
) -> Float[Array, "B Q N D"]:
    """Scaled dot-product attention (arXiv:1706.03762, eq. 1); `mask` is added to the logits.

    Large maps are never held whole: one head and one block of queries at a time, recomputed in the backward pass.
    Under a mesh (`jax.sharding.use_abstract_mesh`) that divides the rows, each device does this with its own.
    """
    if mask is not None or q.shape[1] * k.shape[1] <= BLOCKED_FROM:
        return weigh(attention_map(q, k, mask), v)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or mesh.manual_axes or q.shape[0] % mesh.size:
        return _blocked(q, k, v)
    # The compiler does not see that the rounds of a loop over rows are independent: left to it, every device would
    # gather the rows of all of them and go through them all.
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    return jax.shard_map(_blocked, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _blocked(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attention` by head and block of queries."""
    batch, queries, heads, width = q.shape
    pad = -queries % QUERY_BLOCK
    blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    blocks = blocks.reshape(batch * heads, -1, QUERY_BLOCK, width)
    keys, values = (a.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width) for a in (k, v))

    @jax.checkpoint
    def block(q: Array, k: Array, v: Array) -> Array:
        return weigh(attention_map(q[None, :, None], k[None, :, None]), v[None, :, None])[0, :, 0]

    out = lax.map(lambda row: lax.map(lambda one: block(one, row[1], row[2]), row[0]), (blocks, keys, values))
    out = out.reshape(batch, heads, queries + pad, width).transpose(0, 2, 1, 3)
    return out[:, :queries]


def weigh(probabilities: Float[Array, "B N Q K"], v: Float[Array, "B K N D"]) -> Float[Array, "B Q N D"]:
    """The values averaged by attention probabilities."""
    wide = jnp.promote_types(v.dtype, jnp.float32)
    return jnp.einsum("bnqk,bknd->bqnd", probabilities.astype(v.dtype), v, preferred_element_type=wide).astype(v.dtype)
