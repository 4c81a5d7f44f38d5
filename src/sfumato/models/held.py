"""Layers whose kernel is held in another form than that of files."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

import jax
from flax import nnx
from jaxtyping import Array, Float


class Held(nnx.Module):
    """Stands for an ordinary layer. It draws, but is neither trained nor saved, and nothing is merged into it."""

    form: ClassVar[str]
    """In which form the kernel is."""
    made_by: ClassVar[str]
    """What makes such layers: a function of the package."""

    layer: Any
    """The ordinary layer with what is held for its kernel."""

    @property
    def bias(self) -> nnx.Param | None:
        """The layer's bias, as it was."""
        return self.layer.bias

    @abc.abstractmethod
    def ordinary(self, x: Float[Array, "B *space I"]) -> Float[Array, "*kernel J O"]:
        """The ordinary kernel for an input, in its type."""

    def restored(self, x: Float[Array, "B *space I"]) -> Any:
        """The ordinary layer for an input, in its type."""
        return with_kernel(self.layer, self.ordinary(x))


def held(network: nnx.Module) -> type[Held] | None:
    """The kind of the first such layer of a network; None if there is none."""
    return next((type(module) for _, module in nnx.iter_modules(network) if isinstance(module, Held)), None)


def with_kernel(layer: Any, kernel: Array) -> Any:
    """The layer with another kernel; everything else is the same arrays."""
    layer = jax.tree.map(lambda a: a, layer)
    layer.kernel = layer.kernel.replace(kernel)
    return layer
