"""The leaf layers. Each has the parameter names of Flax; `sfumato.io.fill` knows how they are stored on disk.

A network computes in the type of its parameters: cast the parameters and the computation follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels


def linear(inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer."""
    return nnx.Linear(inputs, outputs, use_bias=bias, dot_general=kernels.dot_general, rngs=rngs)


def conv(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, padding: int | str | tuple | None = None,
    bias: bool = True, zero: bool = False, rngs: nnx.Rngs,
) -> nnx.Conv:
    """A square convolution, padded by `size // 2` unless told otherwise. `zero` starts it at zero (a "zero
    convolution", arXiv:2302.05543, section 3.1)."""
    init = nnx.initializers.zeros_init() if zero else nnx.initializers.lecun_normal()
    return nnx.Conv(
        inputs, outputs, (size, size), strides=stride, padding=size // 2 if padding is None else padding,
        use_bias=bias, kernel_init=init, conv_general_dilated=kernels.conv_general_dilated, rngs=rngs,
    )


def layer_norm(width: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalization with float32 statistics."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalization by `kernels.group_norm`."""

    def __init__(self, groups: int, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        return kernels.group_norm(x, self.scale[...], self.bias[...], self.groups, self.epsilon)


class Identity(nnx.Module):
    """Holds the place of a layer without parameters (dropout, activation) in a numbered list."""

    def __call__(self, x: Array) -> Array:
        return x


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation that CLIP was trained with (arXiv:1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact Gaussian error linear unit (arXiv:1606.08415)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu, "quick_gelu": quick_gelu, "silu": jax.nn.silu, "swish": jax.nn.silu,
    "relu": jax.nn.relu, "mish": jax.nn.mish,
}
"""Activations by the names that configuration files use."""
