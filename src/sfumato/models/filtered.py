"""Convolutions whose kernel is held in the basis of Winograd's filtering."""

from __future__ import annotations

from typing import Any, TypeGuard

import jax
from flax import nnx
from jaxtyping import Array, Float

from sfumato.models import kernels
from sfumato.models.held import Held, with_kernel
from sfumato.models.kernels.convolution import WEIGHTS
from sfumato.models.kernels.winograd import back
from sfumato.models.layers import keeps_size

LEAST = 2**18
"""Pairs of channels from which on a kernel is held so: of smaller ones the change of the basis takes little time."""


class Filtered(Held):
    """A convolution of 3 x 3 that keeps the size, with its kernel as sixteen matrices in place of nine
    (`kernels.filtered`), so that it is not changed anew in every call."""

    form, made_by = "prepared", "prepare"

    def __init__(self, layer: nnx.Conv):
        self.layer = with_kernel(layer, jax.jit(kernels.in_basis)(layer.kernel[...]))

    @property
    def kernel(self) -> nnx.Param:
        """The ordinary kernel, but for rounding."""
        parts = self.layer.kernel
        return parts.replace(back(parts[...]).astype(parts.dtype))

    def ordinary(self, x: Float[Array, "B *space I"]) -> Float[Array, "3 3 J O"]:
        """Of the input only the type counts."""
        return self.kernel[...].astype(x.dtype)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        y = kernels.filtered(x, self.layer.kernel[...])
        return y if self.bias is None else kernels.plus(y, self.bias[...])


def is_large(layer: Any) -> TypeGuard[nnx.Conv]:
    """Whether a layer is one of those that are held so."""
    if not isinstance(layer, nnx.Conv) or not keeps_size(layer):
        return False
    inputs, outputs = layer.kernel.shape[2:]
    return inputs * outputs >= LEAST and layer.kernel.dtype.name in WEIGHTS
