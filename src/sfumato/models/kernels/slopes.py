"""The gradients of a convolution inside a loop, in the one form that XLA's CPU compiler makes by its library there.

Outside of loops the compiler brings every convolution into that form itself: channels last, kernels as HWIO. Inside it
takes those that jax asks for as they are, and makes them place by place, at a twentieth of the rate. Nothing tells a
kernel that it is traced inside, so whoever writes a loop over gradients of networks says so (`inside_loop`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import jax
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels.order import after

LAST = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
"""Channels last, kernels as HWIO."""

Strides = tuple[int, ...]
Pads = tuple[tuple[int, int], ...]


_inside = jax.make_user_context(False)


def inside_loop() -> AbstractContextManager[None]:
    """Within, gradients are made for the body of a loop (`jax.lax.scan`)."""
    return _inside(True)


def is_inside() -> bool:
    """Whether they are."""
    return _inside.value


def turned(kernel: Float[Array, "h w I O"]) -> Float[Array, "h w O I"]:
    """The kernel from results to inputs, turned round by half a turn."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def by_input(
    gradient: Float[Array, "B y x O"], kernel: Float[Array, "h w I O"], size: Sequence[int], stride: Strides, pads: Pads
) -> Float[Array, "B H W I"]:
    """The gradient by an input of this size [H W]: a convolution of the gradient by the results, spread by the stride,
    with the kernel turned round (`after` keeps the compiler from taking the transposition into the convolution)."""
    around = [
        (each - 1 - low, full - 1 + low - (few - 1) * step)
        for each, (low, _), full, few, step in zip(
            kernel.shape[:2], pads, size, gradient.shape[1:3], stride, strict=True
        )
    ]
    return lax.conv_general_dilated(
        gradient, after(gradient, turned(kernel)), (1, 1), around, lhs_dilation=stride, dimension_numbers=LAST
    )


def by_kernel(
    x: Float[Array, "B H W I"], gradient: Float[Array, "B y x O"], size: Sequence[int], stride: Strides, pads: Pads
) -> Float[Array, "h w I O"]:
    """The gradient by a kernel of this size [h w]: a convolution of the input with the gradient by the results, in
    which pictures take the place of channels and channels that of pictures."""
    around = [
        (low, (few - 1) * step + each - full - low)
        for each, (low, _), full, few, step in zip(size, pads, x.shape[1:3], gradient.shape[1:3], stride, strict=True)
    ]
    some, others = after(gradient, x.transpose(3, 1, 2, 0)), after(x, gradient.transpose(1, 2, 0, 3))
    found = lax.conv_general_dilated(some, others, (1, 1), around, rhs_dilation=stride, dimension_numbers=LAST)
    return found.transpose(1, 2, 0, 3)
