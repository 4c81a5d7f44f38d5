"""Attention, whole or in blocks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.mesh import divided
from sfumato.models.kernels.products import widened
from sfumato.models.kernels.table import in_use

BLOCKED_FROM = 2**19
"""Attention maps (one head, one picture) of more entries than this are made block by block."""


def attention_map(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], mask: Float[Array, "#B #N #Q K"] | None = None
) -> Float[Array, "B N Q K"]:
    """softmax(q k^T / sqrt(D) + mask), the attention probabilities, in float32 (arXiv:1706.03762, eq. 1)."""
    q, k = widened(q, k)
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
    dtype, (q, k, v) = q.dtype, widened(q, k, v)
    if q.dtype != dtype:
        return attention(q, k, v, mask).astype(dtype)
    if mask is not None or q.shape[1] * k.shape[1] <= BLOCKED_FROM:
        return weigh(attention_map(q, k, mask), v)
    mesh = jax.sharding.get_abstract_mesh()
    if not divided() or q.shape[0] % mesh.size:
        return _blocked(q, k, v)
    rows = jax.sharding.PartitionSpec(mesh.axis_names)
    return jax.shard_map(_blocked, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _blocked(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attention` by head and block of queries."""
    batch, queries, heads, width = q.shape
    block = in_use().query_block
    pad = -queries % block
    blocks = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0))).transpose(0, 2, 1, 3)
    blocks = blocks.reshape(batch * heads, -1, block, width)
    keys, values = (a.transpose(0, 2, 1, 3).reshape(batch * heads, -1, width) for a in (k, v))

    out = lax.map(lambda row: lax.map(lambda one: _head(one, row[1], row[2]), row[0]), (blocks, keys, values))
    out = out.reshape(batch, heads, queries + pad, width).transpose(0, 2, 1, 3)
    return out[:, :queries]


@jax.checkpoint
def _head(q: Float[Array, "Q D"], k: Float[Array, "K D"], v: Float[Array, "K D"]) -> Float[Array, "Q D"]:
    """`attention` of one head. Written out: as part of a larger product the map would be transposed on the way."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=wide) * q.shape[-1] ** -0.5
    probabilities = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.dot(probabilities, v, preferred_element_type=wide).astype(v.dtype)


def weigh(probabilities: Float[Array, "B N Q K"], v: Float[Array, "B K N D"]) -> Float[Array, "B Q N D"]:
    """The values averaged by attention probabilities."""
    dtype, (v,) = v.dtype, widened(v)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    return jnp.einsum("bnqk,bknd->bqnd", probabilities.astype(v.dtype), v, preferred_element_type=wide).astype(dtype)
