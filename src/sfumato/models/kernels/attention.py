"""Attention: which form it takes, and the forms."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import default_backend, lax
from jaxtyping import Array, Float, Shaped

from sfumato.models.kernels.fused import Attention, fused
from sfumato.models.kernels.mesh import divided
from sfumato.models.kernels.order import after
from sfumato.models.kernels.packed import joined, packed, unpacked
from sfumato.models.kernels.products import widened
from sfumato.models.kernels.table import in_use

BLOCKED_FROM = 2**19
"""Attention maps (one head, one picture) of more entries than this are made block by block."""

ONES = 8
"""Columns of ones beside the values, by which the sums of a softmax come out of the product that weighs them. One would
do; widths of eight numbers are multiplied faster."""

ALIKE, SPARE = 512, 16
"""Keys are as many as a multiple of the former: then rows of a map begin at like addresses, which a processor keeps in
the same few places of its nearest cache; that many keys beside them, which weigh nothing, make it use all."""

HELD = 2**25
"""Entries of the maps of all heads and pictures that a GPU or TPU without a fused kernel for them holds at once."""


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

    Large maps are never held whole, and are made again in the backward pass: on a processor one head and one block of
    queries at a time; on a GPU or TPU by a fused kernel, or in few blocks where none takes the arrays. On a GPU small
    ones without a mask are fused, too. Under a mesh (`jax.sharding.use_abstract_mesh`) each device does this with its
    own rows, or with all if they cannot be divided.
    """
    dtype, (q, k, v) = q.dtype, widened(q, k, v)
    if q.dtype != dtype:
        return attention(q, k, v, mask).astype(dtype)
    form, mesh = _form(q, k, mask, default_backend()), jax.sharding.get_abstract_mesh()
    if form is None:
        return _heads(q, k, v, mask) if default_backend() == "cpu" else weigh(attention_map(q, k, mask), v)
    if not divided():
        return form(q, k, v)
    rows = jax.sharding.PartitionSpec(mesh.axis_names if q.shape[0] % mesh.size == 0 else None)
    return jax.shard_map(form, in_specs=rows, out_specs=rows, check_vma=False)(q, k, v)


def _form(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], mask: Float[Array, "#B #N #Q K"] | None, backend: str
) -> Attention | None:
    """How to make attention where jax computes on `backend`, None for all heads at once, which a mesh may divide."""
    small = mask is not None or q.shape[1] * k.shape[1] <= BLOCKED_FROM
    if backend == "cpu":
        return None if small else _by_head
    kernels = {} if mask is not None or (small and backend == "tpu") else fused(q, k, backend)
    if small and not kernels:
        return None
    # A program for a processor of the same machine has the processor's form. Without the checkpoints the backward pass
    # would be given what every platform keeps for it.
    at_once = _heads, lambda q, k, v: weigh(attention_map(q, k), v)
    own, other = map(jax.checkpoint, at_once) if small else (_by_head, _by_queries)
    return jax.checkpoint(functools.partial(lax.platform_dependent, cpu=own, default=other, **kernels))


def _by_queries(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attention` of all heads, by as many queries at once as `HELD` allows: few large products suit a GPU."""
    batch, queries, heads, width = q.shape
    count = -(-queries * batch * heads * k.shape[1] // HELD)
    block = -(-queries // count)
    blocks = jnp.pad(q, ((0, 0), (0, block * count - queries), (0, 0), (0, 0)))
    blocks = blocks.reshape(batch, count, block, heads, width).swapaxes(0, 1)
    some = jax.checkpoint(lambda block: weigh(attention_map(block, k), v))
    out = lax.map(some, blocks) if count > 1 else some(blocks[0])[None]
    return out.swapaxes(0, 1).reshape(batch, -1, heads, width)[:, :queries]


@jax.custom_jvp
def _by_head(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """`attention` by head and block of queries."""
    return unpacked(_by_block(packed(_scaled(q)), packed(k), packed(_summed(v)), q.dtype), q.dtype)


@_by_head.defjvp
def _by_head_differentiated(arrays: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
    """No gradient goes through whole numbers."""
    return jax.jvp(lambda q, k, v: _by_block(_scaled(q), k, _summed(v), q.dtype), arrays, tangents)


def _by_block(
    q: Shaped[Array, "B Q N D"], k: Shaped[Array, "B K N D"], v: Shaped[Array, "B K N E"], dtype: jnp.dtype
) -> Shaped[Array, "B Q N D"]:
    """`_by_head` of queries that are `_scaled` and values that are `_summed`, of this type or `packed`."""
    batch, queries, heads, width = q.shape
    count = -(-queries // in_use().query_block)
    block = -(-queries // count)
    pad, spare = block * count - queries, 0 if k.shape[1] % ALIKE else SPARE
    blocks = _heads_first(jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))).reshape(batch * heads, -1, block, width)
    # Keys that are there already are no maximum, and weigh nothing where values and what is summed up are zero.
    keys = _heads_first(jnp.concatenate([k, k[:, :spare]], axis=1))
    values = _heads_first(jnp.pad(v, ((0, 0), (0, spare), (0, 0), (0, 0))))

    @jax.checkpoint
    def some(*parts: Array) -> Array:
        return unpacked(_softmax_product(*(unpacked(part, dtype) for part in parts)), q.dtype)

    # Written out: as part of a larger product the map would be transposed on the way.
    out = lax.map(lambda row: lax.map(lambda one: some(one, row[1], row[2]), row[0]), (blocks, keys, values))
    return out.reshape(batch, heads, queries + pad, width).transpose(0, 2, 1, 3)[:, :queries]


def _heads(
    q: Float[Array, "B Q N D"],
    k: Float[Array, "B K N D"],
    v: Float[Array, "B K N D"],
    mask: Float[Array, "#B #N #Q K"] | None = None,
) -> Float[Array, "B Q N D"]:
    """`attention` of all heads at once."""
    batch, queries, heads, _ = q.shape
    if mask is not None:
        mask = jnp.broadcast_to(mask, (batch, heads, *mask.shape[2:])).reshape(-1, *mask.shape[2:])
    # Heads and pictures are one axis, and keys are put in order for themselves: of products of more axes, or that do
    # this on the way, XLA makes such of float32.
    scaled = _scaled(_heads_first(q))
    out = _softmax_product(scaled, after(scaled, _heads_first(k)), _summed(_heads_first(v)), mask)
    return out.reshape(batch, heads, queries, -1).swapaxes(1, 2)


def _heads_first(x: Shaped[Array, "B L N D"]) -> Shaped[Array, "M L D"]:
    """Heads and pictures as one axis, M = B N, in front."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _scaled(q: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """q / sqrt(D): fewer numbers than the logits are."""
    return (q * np.float32(q.shape[-1] ** -0.5)).astype(q.dtype)


def _summed(v: Float[Array, "*B D"]) -> Float[Array, "*B E"]:
    """The values, and beside them what is summed up to 1 by weights that add up to 1."""
    return joined(v, jnp.ones((*v.shape[:-1], ONES), v.dtype))


def _softmax_product(
    q: Float[Array, "*B Q D"],
    k: Float[Array, "*B K D"],
    v: Float[Array, "*B K E"],
    mask: Float[Array, "#B #Q K"] | None = None,
) -> Float[Array, "*B Q D"]:
    """`attention`, heads first, of queries that are `_scaled` and values that are `_summed`.

    The softmax is divided by its sums in the result. So the compiler reads a map twice, for its maximum and for the
    product, in one pass with the exponential, instead of a third time for the sums with the exponential again.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("...qd,...kd->...qk", q, k, preferred_element_type=wide)
    logits = logits if mask is None else logits + mask
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True))).astype(v.dtype)
    out = jnp.matmul(weights, v, preferred_element_type=wide)
    return (out[..., :-ONES] / out[..., -1:]).astype(v.dtype)


def weigh(probabilities: Float[Array, "B N Q K"], v: Float[Array, "B K N D"]) -> Float[Array, "B Q N D"]:
    """The values averaged by attention probabilities."""
    dtype, (v,) = v.dtype, widened(v)
    wide = jnp.promote_types(v.dtype, jnp.float32)
    return jnp.einsum("bnqk,bknd->bqnd", probabilities.astype(v.dtype), v, preferred_element_type=wide).astype(dtype)
