"""Layers with adapters beside them: strengths and adapters are data of the compiled program."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sfumato.adapters.delta import Delta, LowRank, changed, constant, turned, wide
from sfumato.models import kernels
from sfumato.models.held import Held

M = TypeVar("M", bound=nnx.Module)

LEAVES = ("kernel", "scale")
"""The parameters of a layer that are `weight` on disk and that an adapter can change."""


class Adapted(nnx.Module):
    """A layer and the adapters on it, each with its strength; they act one after another as merging would.

    Low-rank changes are applied to the input, x down up, and never multiplied out (arXiv:2106.09685, section 4.1);
    other kinds change the kernel in every call, and so does everything on a layer where one has a magnitude (DoRA).
    A kernel that is int8 or prepared is turned back first.
    """

    def __init__(self, layer: nnx.Module, deltas: tuple[Delta, ...], strengths: tuple[Float[Array, ""], ...]):
        self.layer = layer
        self.deltas: tuple[Delta, ...] = nnx.data(deltas)
        self.strengths: tuple[Float[Array, ""], ...] = nnx.data(strengths)

    @property
    def kernel(self) -> nnx.Param:
        """The layer's own kernel, as it is without adapters."""
        return self.layer.kernel  # type: ignore[attr-defined]

    def __call__(self, x: Float[Array, "B *space I"]) -> Float[Array, "B *space2 O"]:
        pairs = list(zip(self.deltas, self.strengths, strict=True))
        beside = [] if any(delta.magnitude is not None for delta in self.deltas) else [
            (delta, strength) for delta, strength in pairs if isinstance(delta, LowRank)
        ]  # fmt: skip
        layer: Any = self.layer.restored(x) if isinstance(self.layer, Held) else self.layer
        for delta, strength in pairs:
            if not any(delta is each for each, _ in beside):
                layer = merged(layer, delta, strength)
        y = layer(x)
        for delta, strength in beside:
            y = jnp.where(strength == 0, y, y + _low_rank(layer, delta, strength, x))
        return y


def adapted(layer: nnx.Module, delta: Delta, strength: Float[Array, ""]) -> Adapted:
    """The layer with one more adapter beside it."""
    delta = arrays(delta)
    if isinstance(layer, Adapted):
        return Adapted(layer.layer, (*layer.deltas, delta), (*layer.strengths, strength))
    return Adapted(layer, (delta,), (strength,))


def merged(layer: Any, delta: Delta, strength: Float[Array, ""]) -> Any:
    """The layer with an adapter in its parameters, in their own type; of an adapted one, beneath the others."""
    if isinstance(layer, Adapted):
        return Adapted(merged(layer.layer, delta, strength), layer.deltas, layer.strengths)
    layer, name = copied(layer), leaf_of(layer) or ""
    weight, bias = getattr(layer, name), None if delta.bias is None else layer.bias
    values = _merge(weight[...], None if bias is None else bias[...], arrays(delta), strength)
    setattr(layer, name, weight.replace(values[0]))
    if bias is not None:
        layer.bias = bias.replace(values[1])
    return layer


def arrays(delta: Delta) -> Delta:
    """The delta with jax arrays for all leaves, so that programs are the same for what is read and what is made."""
    return jax.tree.map(lambda leaf: jnp.asarray(np.float32(leaf) if isinstance(leaf, float | int) else leaf), delta)


@jax.jit
def _merge(kernel: Array, bias: Array | None, delta: Delta, strength: Float[Array, ""]) -> tuple[Array, Array | None]:
    if bias is not None:
        shifted = bias.astype(jnp.float32) + strength * wide(delta.bias)
        bias = jnp.where(strength == 0, bias, shifted.astype(bias.dtype))
    return changed(kernel, delta, strength).astype(kernel.dtype), bias


def _low_rank(layer: Any, delta: LowRank, strength: Float[Array, ""], x: Array) -> Array:
    """strength scale x down (mid) up, with the strides and the padding of the layer."""
    kernel = layer.kernel

    def through(factor: Any) -> nnx.Module:
        """The layer with the factor for a kernel."""
        small = copied(layer)
        shape = (*kernel.shape[:-2], factor.shape[1], factor.shape[0])
        small.kernel = kernel.replace(turned(wide(factor), shape).astype(x.dtype))
        small.bias, small.use_bias = None, False
        return small

    hidden = through(delta.down)(x) if delta.mid is None else through(delta.mid)(_pointwise(x, delta.down))
    return _pointwise(hidden, strength * constant(delta.scale) * wide(delta.up))


def _pointwise(x: Array, factor: Any) -> Array:
    """A 1 x 1 convolution or dense layer with a factor [O, I, ...]."""
    matrix = wide(factor).reshape(factor.shape[:2]).astype(x.dtype)
    return kernels.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())))


def leaf_of(layer: Any) -> str | None:
    """The name of the parameter that an adapter of this layer changes; None if there is none."""
    return next((name for name in LEAVES if isinstance(getattr(layer, name, None), nnx.Param)), None)


def is_live(network: nnx.Module) -> bool:
    """Whether any layer has adapters beside it."""
    return any(isinstance(module, Adapted) for _, module in nnx.iter_modules(network))


def copied(network: M) -> M:
    """Other modules around the same arrays."""
    return jax.tree.map(lambda a: a, network)


def find(network: nnx.Module, path: str) -> Any:
    """The module at a checkpoint path; None if there is none."""
    module: Any = network
    for name in path.split("."):
        if name.isdigit():
            module = module[int(name)] if isinstance(module, nnx.List) and int(name) < len(module) else None
        else:
            module = getattr(module, name, None)
    return module


def replaced(network: M, layers: dict[str, nnx.Module]) -> M:
    """The network with other layers at these checkpoint paths; the rest are the same arrays."""
    network = copied(network)
    for path, layer in layers.items():
        *above, name = path.split(".")
        parent: Any = find(network, ".".join(above)) if above else network
        if name.isdigit():
            parent[int(name)] = layer
        else:
            setattr(parent, name, layer)
    return network
