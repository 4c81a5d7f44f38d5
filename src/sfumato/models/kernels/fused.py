"""Attention by the fused kernels of GPUs and TPUs, which never hold a map."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Attention = Callable[[Float[Array, "B Q N D"], Float[Array, "B K N D"], Float[Array, "B K N D"]], Array]

CALLS = ("__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward")
"""The names of `cudnn`, forward and backward, in a program. jax promises them to no other version of itself."""

LANES = 128
"""What a TPU handles at once: shorter keys, and wider heads, are filled up to multiples of it."""

BLOCK = 512
"""Queries, and keys, that the TPU's kernel handles at once; half as many of heads wider than `LANES`, so that they fit
beside each other into its fast memory."""


def fused(q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], backend: str) -> Mapping[str, Attention]:
    """The kernel for arrays like these by its platform, where jax computes on `backend`; nothing if there is none."""
    if backend == "tpu":
        return {"tpu": flash} if k.shape[1] >= BLOCK else {}
    if backend != "cpu" and _taken(q.shape, k.shape, q.dtype.name):
        return {"cuda": cudnn}
    return {}


_cudnn = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")


def cudnn(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """cuDNN's, for 16-bit types and heads of some widths. Raises NotImplementedError for others."""
    return (_odd if q.shape[1] % 2 or k.shape[1] % 2 else _cudnn)(q, k, v)


@jax.custom_vjp
def _odd(q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]) -> Array:
    """For odd lengths, of which jax makes no gradients by cuDNN: they are those of the next even ones."""
    return _cudnn(q, k, v)


def _even(q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]) -> Array:
    some = jnp.full((len(k),), k.shape[1], jnp.int32)
    pads = [((0, 0), (0, each.shape[1] % 2), (0, 0), (0, 0)) for each in (q, k, v)]
    return _cudnn(*map(jnp.pad, (q, k, v), pads), key_value_seq_lengths=some)[:, : q.shape[1]]


_odd.defvjp(lambda *three: (_odd(*three), three), lambda three, gradient: jax.vjp(_even, *three)[1](gradient))


@functools.cache
def _taken(q: tuple[int, ...], k: tuple[int, ...], dtype: str) -> bool:
    """Whether this GPU's cuDNN takes arrays of these shapes, and makes gradients of them, which is asked for more. Only
    jax knows, which says so while it traces."""
    queries, keys = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k))
    try:
        jax.eval_shape(lambda *three: jax.vjp(cudnn, *three)[0], queries, keys, keys)
    except (NotImplementedError, RuntimeError):  # a type or width that it does not take; no cuDNN
        return False
    return True


def flash(
    q: Float[Array, "B Q N D"], k: Float[Array, "B K N D"], v: Float[Array, "B K N D"]
) -> Float[Array, "B Q N D"]:
    """JAX's FlashAttention for TPUs (arXiv:2205.14135). What fills up keys is of another segment than the queries."""
    from jax.experimental.pallas.ops.tpu import flash_attention as tpu  # a tenth of a second that nobody else pays

    most = BLOCK if q.shape[-1] <= LANES else BLOCK // 2
    (queries, by_q), (keys, by_k) = (_filled(a.shape[1], most) for a in (q, k))
    width = q.shape[-1] + (-q.shape[-1] % LANES if q.shape[-1] > LANES else 0)

    def heads(a: Array, length: int) -> Float[Array, "B N L W"]:
        return jnp.pad(a, ((0, 0), (0, length - a.shape[1]), (0, 0), (0, width - a.shape[-1]))).swapaxes(1, 2)

    segments = None
    if keys != k.shape[1]:
        of_keys = (jnp.arange(keys) >= k.shape[1]).astype(jnp.int32)
        segments = tpu.SegmentIds(jnp.zeros((len(q), queries), jnp.int32), jnp.broadcast_to(of_keys, (len(k), keys)))
    sizes = tpu.BlockSizes(
        block_b=1, block_q=by_q, block_k_major=by_k, block_k=by_k,
        block_q_major_dkv=by_q, block_q_dkv=by_q, block_k_major_dkv=by_k, block_k_dkv=by_k,
        block_q_dq=by_q, block_k_major_dq=by_k, block_k_dq=by_k,
    )  # fmt: skip
    out = tpu.flash_attention(
        heads(q, queries), heads(k, keys), heads(v, keys),
        segment_ids=segments, sm_scale=q.shape[-1] ** -0.5, block_sizes=sizes,
    )  # fmt: skip
    return out.swapaxes(1, 2)[:, : q.shape[1], :, : q.shape[-1]]


def _filled(length: int, most: int) -> tuple[int, int]:
    """A length filled up to whole blocks, and the block: `most`, or as many lanes as a shorter one needs."""
    block = min(most, length + -length % LANES)
    return length + -length % block, block
