"""Convolutions: which form they take, and the forms."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
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

COLORS, FEW_INPUTS, FEW_OUTPUTS = 4, 16, 8
"""Up to so many channels a convolution is made of two places at once (`paired`), from colours as sums (`summed`)."""

CHANNELS, PLACES = 64, 128
"""Where programs are made patiently: from how many channels on there are other forms, and from how many places on
small kernels of float32 are filtered by F2."""

WEIGHTS: Mapping[str, int] = {"float32": 2**20, "bfloat16": 0}
"""By type: from how large a kernel on, in pairs of channels, `taps` are faster than the backend's own where no other
form is."""

_patient = jax.make_user_context(False)


def patiently(yes: bool = True) -> AbstractContextManager[None]:
    """Inside, small kernels of float32 are filtered by F2: that is faster than F4, and takes a third longer to compile,
    which pays where a program runs thousands of times."""
    return _patient(yes)


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
    if _has_few(x, kernel, stride, pads):
        return summed if kernel[2] <= COLORS else paired
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
    least = CHANNELS if _patient.value else in_use().channels
    return known and tuple(kernel[:2]) == (3, 3) and min(kernel[2:]) >= least


def _has_few(x: Sequence[int], kernel: Sequence[int], stride: Strides, pads: Pads) -> bool:
    """Whether a convolution is of so few channels that `paired` is faster, and of an even width."""
    few = tuple(kernel[:2]) == (3, 3) and kernel[2] <= FEW_INPUTS and kernel[3] <= FEW_OUTPUTS
    return few and (stride, pads) == ((1, 1), SAME) and x[2] % 2 == 0 and not divided()


def _filterings(name: str, table: Table, pairs: int) -> tuple[tuple[int, winograd.Form, int], ...]:
    """From how many places of all pictures on which form is the fastest for a kernel of so many pairs of channels, and
    in blocks of how many values. Larger tiles are too coarse in bfloat16."""
    if name == "float32":
        if pairs < HEAVY and _patient.value:
            return ((PLACES, winograd.F2, table.f2_block),)
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


def paired(x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]) -> Float[Array, "B H W O"]:
    """A convolution that gives two neighbours at once, as twice as many channels: with few of them it takes as long to
    collect what is multiplied as to multiply it, and this collects two thirds as much for as many results. W is even.
    """
    apart = [jnp.pad(kernel, ((0, 0), (right, 1 - right), (0, 0), (0, 0))) for right in (0, 1)]
    both = _with_gradients(None, (1, 2), SAME)(x, jnp.concatenate(apart, axis=-1))
    return both.reshape(*x.shape[:3], -1)


def summed(x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"]) -> Float[Array, "B H W O"]:
    """A convolution as a sum of pictures, each of one channel and moved by one place at most. It is for what comes in:
    the compiler makes what was computed before anew for each of them."""
    (height, width), wide = x.shape[1:3], jnp.promote_types(x.dtype, jnp.float32)
    around = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = (
        around[:, i : i + height, j : j + width, each, None].astype(wide) * kernel[i, j, each].astype(wide)
        for i in range(3) for j in range(3) for each in range(x.shape[3])
    )  # fmt: skip
    return functools.reduce(operator.add, terms).astype(x.dtype)


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

    def by_pairs(x: Array, kernel: Array, gradient: Array) -> tuple[Array, Array]:
        return jax.vjp(paired, x, kernel)[1](gradient)

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        here = by_pairs if other in (paired, summed) else inside if is_inside() else outside
        x, kernel = saved
        at_x, at_kernel = lax.platform_dependent(x, kernel, gradient, cpu=here, default=outside)
        if (stride, pads) == ((1, 1), SAME):
            # The gradient by the input is a convolution, too, which may take another form.
            found: Any = form(gradient.shape, (*kernel.shape[:2], *kernel.shape[:1:-1]), x.dtype)
            if getattr(found, "func", None) is winograd.convolve:
                at_x = _around(found)(gradient, kernel)
            elif found is not None:
                at_x = conv_general_dilated(gradient, turned(kernel), stride, pads, dimension_numbers=LAST)
        return at_x, at_kernel

    convolve.defvjp(forward, backward)
    return convolve


@functools.cache
def _around(form: Any) -> Convolution:
    """The gradient of a convolution by its input by this form, filtered, on a processor, and its own gradients."""

    def own(x: Array, kernel: Array) -> Array:
        return native(x, turned(kernel))

    @jax.custom_vjp
    def convolve(x: Array, kernel: Array) -> Array:
        return lax.platform_dependent(x, kernel, cpu=functools.partial(form, around=True), default=own)

    def backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
        x, kernel = saved
        at_x, pull = jax.vjp(_with_gradients(form, (1, 1), SAME), gradient, kernel)
        return at_x, pull(x)[1]

    convolve.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), backward)
    return convolve
