"""Embeddings of the time step and of what is added to it."""

from __future__ import annotations

import math

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels
from sfumato.models.layers import layer_norm, linear, parameter, silu


def sinusoidal(
    t: Float[Array, " B"], width: int, *, flip_sin_to_cos: bool = True, freq_shift: int = 0
) -> Float[Array, "B width"]:
    """Sines and cosines of `t` at `width // 2` frequencies from 1 down to 1/10000 (arXiv:1706.03762, section 3.5).

    `flip_sin_to_cos` puts the cosines first; `freq_shift` 1 makes the last frequency exactly 1/10000. Float32.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000) * jnp.arange(half, dtype=jnp.float32) / (half - freq_shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies
    waves = (jnp.cos(angles), jnp.sin(angles)) if flip_sin_to_cos else (jnp.sin(angles), jnp.cos(angles))
    return jnp.pad(jnp.concatenate(waves, axis=-1), ((0, 0), (0, width % 2)))


class TimeEmbedding(nnx.Module):
    """A two-layer perceptron; `condition` is the width of a second input that is added first, if there is one."""

    def __init__(self, inputs: int, outputs: int, *, condition: int | None = None, rngs: nnx.Rngs):
        self.linear_1 = linear(inputs, outputs, rngs=rngs)
        self.linear_2 = linear(outputs, outputs, rngs=rngs)
        if condition is not None:
            self.cond_proj = linear(condition, inputs, bias=False, rngs=rngs)

    def __call__(self, x: Float[Array, "B I"], condition: Float[Array, "B G"] | None = None) -> Float[Array, "B O"]:
        x = x.astype(self.linear_1.kernel.dtype)
        if condition is not None:
            x = x + self.cond_proj(condition.astype(x.dtype))
        return self.linear_2(silu(self.linear_1(x)))


class AttentionPooling(nnx.Module):
    """One vector for a sequence: its mean, plus a learned offset, attends to the sequence and to itself."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.positional_embedding = parameter(rngs, (1, width), nnx.initializers.normal(width**-0.5))
        self.q_proj, self.k_proj, self.v_proj = (linear(width, width, rngs=rngs) for _ in range(3))

    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        token = x.mean(axis=1, keepdims=True) + self.positional_embedding[...]
        x = jnp.concatenate([token, x], axis=1)
        q, k, v = (
            y.reshape(*y.shape[:2], self.heads, -1) for y in (self.q_proj(token), self.k_proj(x), self.v_proj(x))
        )
        return kernels.attention(q, k, v).reshape(token.shape)[:, 0]


class TextEmbedding(nnx.Module):
    """The whole context pooled into a vector that is added to the time (`addition_embed_type` "text")."""

    def __init__(self, context: int, outputs: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = layer_norm(context, rngs=rngs)
        self.pool = AttentionPooling(context, heads, rngs=rngs)
        self.proj = linear(context, outputs, rngs=rngs)
        self.norm2 = layer_norm(outputs, rngs=rngs)

    def __call__(self, context: Float[Array, "B L D"]) -> Float[Array, "B O"]:
        return self.norm2(self.proj(self.pool(self.norm1(context))))
