"""The leaf layers. Each has the parameter names of Flax; `sfumato.io.fill` knows how they are stored on disk.

A network computes in the type of its parameters: cast the parameters and the computation follows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels

M = TypeVar("M", bound=nnx.Module)
Initializer = Callable[..., Any]


class Shapes(nnx.Rngs):
    """Stands where random keys would come from: a network built with it has shapes and no numbers.

    Tracing the construction instead (`nnx.eval_shape`) takes seconds for a network of this size.
    """

    def __init__(self) -> None:
        pass

    def params(self) -> None:
        return None


def abstract(network: Callable[..., M], config: Any) -> M:
    """The network of `config` with `jax.ShapeDtypeStruct`s for parameters: nothing is allocated."""
    return network(config, rngs=Shapes())


def init(initializer: Initializer) -> Initializer:
    """The initializer, which gives just a shape where there is no key (see `Shapes`)."""

    def start(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype) if key is None else initializer(key, shape, dtype)

    return start


ZEROS, ONES, LECUN = (init(i) for i in (nnx.initializers.zeros, nnx.initializers.ones, nnx.initializers.lecun_normal()))


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], initializer: Initializer) -> nnx.Param:
    """A float32 parameter that is no part of a layer."""
    return nnx.Param(init(initializer)(rngs.params(), shape, jnp.float32))


class Linear(nnx.Linear):
    """`nnx.Linear`, which adds its bias by `kernels.plus`."""

    def __call__(self, inputs: Float[Array, "*space I"]) -> Float[Array, "*space O"]:  # type: ignore[override]
        y = nnx.Linear.__call__(_without_bias(self), inputs)
        return y if self.bias is None else kernels.plus(y, self.bias[...])


class Conv(nnx.Conv):
    """`nnx.Conv`, which adds its bias by `kernels.plus`."""

    def __call__(self, inputs: Float[Array, "B *space I"]) -> Float[Array, "B *space2 O"]:  # type: ignore[override]
        y = nnx.Conv.__call__(_without_bias(self), inputs)
        return y if self.bias is None else kernels.plus(y, self.bias[...])


def _without_bias(layer: nnx.Linear | nnx.Conv) -> Any:
    """The same arrays but for the bias."""
    bare: Any = jax.tree.map(lambda a: a, layer)
    bare.bias, bare.use_bias = None, False
    return bare


def linear(inputs: int, outputs: int, *, bias: bool = True, rngs: nnx.Rngs) -> nnx.Linear:
    """A dense layer."""
    return Linear(
        inputs, outputs, use_bias=bias, kernel_init=LECUN, bias_init=ZEROS, dot_general=kernels.dot_general, rngs=rngs
    )


def conv(
    inputs: int, outputs: int, size: int = 3, *, stride: int = 1, padding: int | str | tuple | None = None,
    bias: bool = True, zero: bool = False, rngs: nnx.Rngs,
) -> nnx.Conv:  # fmt: skip
    """A square convolution, padded by `size // 2` unless told otherwise. `zero` starts it at zero (a "zero
    convolution", arXiv:2302.05543, section 3.1)."""
    return Conv(
        inputs, outputs, (size, size), strides=stride, padding=size // 2 if padding is None else padding,
        use_bias=bias, kernel_init=ZEROS if zero else LECUN, bias_init=ZEROS,
        conv_general_dilated=kernels.conv_general_dilated, rngs=rngs,
    )  # fmt: skip


def keeps_size(layer: nnx.Conv) -> bool:
    """Whether a convolution is one of 3 x 3 whose results are as many as its places."""
    sides, strides, padding = layer.kernel.shape[:2], layer.strides, layer.padding
    return sides == (3, 3) and strides in (1, (1, 1)) and padding in (1, ((1, 1), (1, 1)))


def embed(count: int, width: int, *, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of vectors, started as CLIP's (standard deviation 0.02)."""
    table = nnx.Embed(count, width, embedding_init=init(nnx.initializers.normal(0.02)), rngs=rngs)
    table.dtype = None  # nnx.Embed notes the first type of its parameter and would keep to it after a cast
    return table


def layer_norm(width: int, *, epsilon: float = 1e-5, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer normalization with float32 statistics."""
    return nnx.LayerNorm(width, epsilon=epsilon, use_fast_variance=False, scale_init=ONES, bias_init=ZEROS, rngs=rngs)


class GroupNorm(nnx.Module):
    """Group normalization by `kernels.group_norm`."""

    def __init__(self, groups: int, channels: int, *, epsilon: float, rngs: nnx.Rngs):
        self.groups, self.epsilon = groups, epsilon
        self.scale = parameter(rngs, (channels,), nnx.initializers.ones)
        self.bias = parameter(rngs, (channels,), nnx.initializers.zeros)

    def __call__(
        self, x: Float[Array, "B *space C"], last: Float[Array, "*other"] | None = None
    ) -> Float[Array, "B *space C"]:
        """Once `last` is there, with which `x` has been used for the last time: the result can take its memory."""
        scale = self.scale[...] if last is None else kernels.after(last, self.scale[...])
        return kernels.group_norm(x, scale, self.bias[...], self.groups, self.epsilon)


class Identity(nnx.Module):
    """Holds the place of a layer without parameters (dropout, activation) in a numbered list."""

    def __call__(self, x: Array) -> Array:
        return x


def precise(x: Array) -> Array:
    """`x` in float32 or better, for what takes several operations: a processor rounds after each of half precision,
    which takes longer than the operations."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), the approximation that CLIP was trained with (arXiv:1606.08415, section 2)."""
    y = precise(x)
    return (y * jax.nn.sigmoid(1.702 * y)).astype(x.dtype)


def silu(x: Array) -> Array:
    """x sigmoid(x) (arXiv:1606.08415, section 2)."""
    return jax.nn.silu(precise(x)).astype(x.dtype)


def gelu(x: Array) -> Array:
    """The exact Gaussian error linear unit (arXiv:1606.08415)."""
    y = precise(x)
    # By the error function: jax.nn.gelu takes its complement, which is exact to more digits far below zero, where
    # nothing is left of x, and takes twice as long.
    return (0.5 * y * (1 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


ACTIVATIONS: Mapping[str, Callable[[Array], Array]] = {
    "gelu": gelu,
    "quick_gelu": quick_gelu,
    "silu": silu,
    "swish": silu,
    "relu": jax.nn.relu,
    "mish": jax.nn.mish,
}
"""Activations by the names that configuration files use."""
