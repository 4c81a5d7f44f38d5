"""Convolutions: which form they take, and the forms."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels import winograd
from sfumato.models.kernels.mesh import divided
from sfumato.models.kernels.order import after
from sfumato.models.kernels.packed import moved
from sfumato.models.kernels.products import dot_general, multiplied_in, widened
from sfumato.models.kernels.slopes import LAST, Pads, Strides, by_input, by_kernel, is_inside, turned
from sfumato.models.kernels.table import NEVER, Table, in_use

Convolution = Callable[[Float[Array, "B H W I"], Float[Array, "3 3 I O"]], Float[Array, "B h w O"]]

SAME: Pads = ((1, 1), (1, 1))
"""Keeps the size of a convolution of 3 x 3."""

FEW = 2**20
"""Values of a block (`winograd.convolve`) for few places and many channels, where the kernel is larger than the
picture: it is read once."""

LARGEST = 2**26
"""Values of all pictures up to which other forms than the backend's own are taken: they need a few copies of them."""

HEAVY, MANY = 2**18, 2**13
"""Pairs of channels and places of all pictures: with more of those and fewer of these it is the kernel that takes time
when the basis is changed, and F4 makes four times as much of it where F2 does not make twice."""

WEIGHTS: Mapping[str, int] = {"float32": 2**20, "bfloat16": 0}
"""By type: from how large a kernel on, in pairs of channels, `taps` are faster than the backend's own where no other
form is."""


def conv_general_dilated(lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **kwargs: Any) -> Array:
    """`jax.lax.conv_general_dilated`; the type of `lhs` is kept.

    Those of 1 x 1 are products of matrices; on a processor those of 3 x 3 may take another form.
    """
    if _simple(rhs, kwargs) and not isinstance(padding, str):
        stride, pads = tuple(window_strides), tuple((low, high) for low, high in padding)
        small = math.prod(lhs.shape[:-1]) * max(rhs.shape[2:]) <= LARGEST
        if small and rhs.shape[:2] == (1, 1) and stride == (1, 1) and pads == ((0, 0), (0, 0)):
            return dot_general(lhs, rhs[0, 0], (((3,), (0,)), ((), ())))
        other = form(lhs.shape, rhs.shape, lhs.dtype, stride, pads) if small else None
        if other is not None or (is_inside() and not divided()):
            return _with_gradients(other, stride, pads)(lhs, rhs.astype(lhs.dtype))
    x, kernel = widened(lhs, rhs)
    return lax.conv_general_dilated(x, kernel, window_strides, padding, **kwargs).astype(lhs.dtype)


def form(
    x: Sequence[int], kernel: Sequence[int], dtype: Any, stride: Strides = (1, 1), pads: Pads = SAME
) -> Convolution | None:
    """What to compute a convolution of these shapes by on a processor, None for the backend's own."""
    if not has_forms(kernel, dtype):
        return None
    name, table = multiplied_in(dtype).name, in_use()
    if (stride, pads) == ((1, 1), SAME):
        for places, filtering, block in _filterings(name, table, math.prod(kernel[2:])):
            if math.prod(x[:3]) >= places:
                return _filtered(filtering, block)
    return _taps(stride, pads) if math.prod(kernel[2:]) >= WEIGHTS[name] else None


def has_forms(kernel: Sequence[int], dtype: Any) -> bool:
    """Whether there are other forms than the backend's own for kernels of this shape."""
    known = not divided() and multiplied_in(dtype).name in WEIGHTS
    return known and tuple(kernel[:2]) == (3, 3) and min(kernel[2:]) >= in_use().channels


def _filterings(name: str, table: Table, pairs: int) -> tuple[tuple[int, winograd.Form, int], ...]:
    """From how many places of all pictures on which form is the fastest for a kernel of so many pairs of channels, and
    in blocks of how many values. Larger tiles are too coarse in bfloat16."""
    if name == "float32":
        if pairs < HEAVY or table.float32_f2 == NEVER:
            return ((table.float32_f4, winograd.F4, table.f4_block),)
        many = max(table.float32_f4, MANY)
        return (many, winograd.F4, table.f4_block), (table.float32_f2, winograd.F2, FEW)
    return (table.bfloat16_f2, winograd.F2, table.f2_block), (table.bfloat16_f2_few, winograd.F2, FEW)


@functools.cache
def _filtered(form: winograd.Form, block: int) -> Convolution:
    return functools.partial(winograd.convolve, form=form, block=block)


@functools.cache
def _taps(stride: Strides, pads: Pads) -> Convolution:
    return functools.partial(taps, stride=stride, pads=pads)


def taps(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"], stride: Strides = (1, 1), pads: Pads = SAME
) -> Float[Array, "B h w O"]:
    """A convolution as one product of matrices: each place beside its eight neighbours."""
    dtype, (x, kernel) = x.dtype, widened(x, kernel)
    height, width = ((x.shape[1 + axis] + sum(pads[axis]) - 3) // stride[axis] + 1 for axis in (0, 1))

    def around(x: Array) -> Array:
        padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
        rows = [padded[:, i : i + (height - 1) * stride[0] + 1 : stride[0]] for i in range(3)]
        places = [row[:, :, i : i + (width - 1) * stride[1] + 1 : stride[1]] for row in rows for i in range(3)]
        return jnp.concatenate(places, axis=-1)

    rows = moved(around, x).reshape(-1, 9 * x.shape[-1])
    out = jnp.dot(rows, kernel.reshape(rows.shape[1], -1), preferred_element_type=jnp.float32)
    return out.reshape(len(x), height, width, -1).astype(dtype)


@jax.custom_vjp
def filtered(x: Float[Array, "B H W I"], kernel: Float[Array, "16 I O"]) -> Float[Array, "B H W O"]:
    """A convolution of 3 x 3 that keeps the size, with a kernel in the basis of `winograd.F2`. It has gradients by the
    picture; those by the kernel are zero."""

    def on_processor(x: Array, kernel: Array) -> Array:
        within = multiplied_in(x.dtype)
        kernel = kernel if kernel.dtype == within else after(x, kernel).astype(within)
        return winograd.filtered(x, list(kernel), winograd.F2, block_of(x))

    def elsewhere(x: Array, kernel: Array) -> Array:
        return native(x, winograd.back(kernel).astype(x.dtype))

    return lax.platform_dependent(x, kernel, cpu=on_processor, default=elsewhere)


filtered.defvjp(
    lambda x, kernel: (filtered(x, kernel), kernel),
    lambda kernel, gradient: (filtered(gradient, winograd.turned(kernel)), jnp.zeros_like(kernel)),
)


def block_of(x: Float[Array, "B H W I"]) -> int:
    """How many values small tiles are handled in at once."""
    many = in_use().bfloat16_f2 if multiplied_in(x.dtype) == jnp.bfloat16 else MANY
    return in_use().f2_block if math.prod(x.shape[:3]) >= many else FEW


def in_basis(kernel: Float[Array, "3 3 I O"]) -> Float[Array, "16 I O"]:
    """What `filtered` takes, in the type of the kernel."""
    return jnp.stack(winograd.moved(kernel, winograd.F2, kernel.dtype))


def native(
    x: Float[Array, "B H W I"], kernel: Float[Array, "p q I O"], stride: Strides = (1, 1), pads: Pads = SAME
) -> Float[Array, "B h w O"]:
    """The same by the backend's own."""
    dtype, (x, kernel) = x.dtype, widened(x, kernel)
    return lax.conv_general_dilated(x, kernel, stride, pads, dimension_numbers=LAST).astype(dtype)


def _simple(kernel: Array, settings: Mapping[str, Any]) -> bool:
    """Whether it is a convolution of a channel-last picture without dilation and groups."""
    spread = {*(settings.get("lhs_dilation") or ()), *(settings.get("rhs_dilation") or ())}
    groups = settings.get("feature_group_count", 1)
    return kernel.ndim == 4 and spread <= {1} and groups == 1 and settings.get("dimension_numbers") == LAST


@functools.cache
def _with_gradients(other: Convolution | None, stride: Strides, pads: Pads) -> Convolution:
    """`other`, if there is one, on a processor and the backend's own elsewhere, with gradients that suit them."""
    own = functools.partial(native, stride=stride, pads=pads)

    @jax.custom_vjp
    def convolve(x: Array, kernel: Array) -> Array:
        return own(x, kernel) if other is None else lax.platform_dependent(x, kernel, cpu=other, default=own)

    def forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
        return convolve(x, kernel), (x, kernel)

    def inside(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        dtype, (x, kernel, gradient) = x.dtype, widened(x, kernel, gradient)
        by_x = by_input(gradient, kernel, x.shape[1:3], stride, pads)
        return by_x.astype(dtype), by_kernel(x, gradient, kernel.shape[:2], stride, pads).astype(dtype)

    def outside(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(own, x, kernel)[1](gradient)

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        here = inside if is_inside() else outside
        at_x, at_kernel = lax.platform_dependent(*saved, gradient, cpu=here, default=outside)
        x, kernel = saved
        if (stride, pads) == ((1, 1), SAME) and form(gradient.shape, turned(kernel).shape, x.dtype) is not None:
            # The gradient by the input is a convolution, too, which may take another form.
            at_x = conv_general_dilated(gradient, turned(kernel), stride, pads, dimension_numbers=LAST)
        return at_x, at_kernel

    convolve.defvjp(forward, backward)
    return convolve
