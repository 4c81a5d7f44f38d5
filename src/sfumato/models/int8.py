"""Layers whose kernels are whole numbers of eight bits: a quarter of the memory of float32, half that of bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32
from jaxtyping import Int8 as Whole

from sfumato.models import kernels
from sfumato.models.held import Held, with_kernel

LARGEST = 127
"""Kernels are symmetric: -128 is not used."""


class Int8(Held):
    """A dense layer or convolution with its kernel as int8, and one float32 scale for each output channel.

    The kernel is turned back into the type of the input in every call, and rounded no more than once: with the scale
    applied to the product instead, float16 would overflow where the layer itself does not.
    """

    form, made_by = "int8", "quantize"

    def __init__(self, layer: nnx.Linear | nnx.Conv):
        whole, scale = rounded(layer.kernel[...])
        self.layer = with_kernel(layer, whole)
        self.scale = nnx.Param(scale)

    @property
    def kernel(self) -> nnx.Param:
        """The whole numbers."""
        return self.layer.kernel

    def ordinary(self, x: Float[Array, "B *space I"]) -> Float[Array, "*kernel J O"]:
        """Only once the input is there."""
        return (kernels.after(x, self.kernel[...]) * self.scale[...]).astype(x.dtype)

    def __call__(self, x: Float[Array, "B *space I"]) -> Float[Array, "B *space2 O"]:
        return self.restored(x)(x)


@jax.jit
def rounded(kernel: Float[Array, "*space I O"]) -> tuple[Whole[Array, "*space I O"], Float32[Array, " O"]]:
    """(q, scale) with `kernel` ~ q scale, off by half a scale at most: the largest number of each output channel
    becomes 127 or -127, zeros stay. A channel of zeros has the scale 0."""
    wide = kernel.astype(jnp.float32)
    scale = jnp.abs(wide).max(range(kernel.ndim - 1)) / LARGEST
    return jnp.round(wide / jnp.where(scale > 0, scale, 1)).astype(jnp.int8), scale
