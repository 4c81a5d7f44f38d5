"""Convolutions of 3 x 3 by Winograd's minimal filtering (arXiv:1509.09308): fewer multiplications, in ordinary products
of matrices, which is what a processor is fastest at.

A tile of m x m results is made of (m + 2) x (m + 2) values. Tiles and kernel are brought into another basis, multiplied
there value by value (for all channels: (m + 2)^2 products of matrices), and brought back. m = 2 needs 4 multiplications
a result instead of 9, m = 4 needs 2.25, but its basis has larger numbers: in bfloat16 it loses a digit and a half.

A picture whose numbers are repeated along both axes needs 2.25 as well, with the smallest numbers of all (`TWICE`).
"""

from __future__ import annotations

import dataclasses as dc
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Shaped

from sfumato.models.kernels.order import after, once, together
from sfumato.models.kernels.packed import packed, unpacked
from sfumato.models.kernels.products import multiplied_in

Matrix = tuple[tuple[float, ...], ...]
Prologue = Callable[[Float[Array, "b h w C"], Array], Float[Array, "b h w I"]]
"""Of a piece of a picture, and the number of the first of its pictures."""

Epilogue = Callable[[Float[Array, "b h w O"], Array, Array, Any], Float[Array, "b h w O"]]
"""Of a piece of a result, the numbers of the first of its pictures and lines, and the piece that it is written over, or
None."""

Parts = Any
"""Arrays of one shape: a list of them, or one array of them all, stacked."""


@dc.dataclass(frozen=True)
class Form:
    """How a tile is computed: m x m results from as many values as its matrices have lines."""

    m: int
    """Results of a tile along each axis."""
    step: int
    """Values from one tile to the next."""
    data: Matrix
    """What a tile of values is multiplied by from both sides (eq. 6: B^T)."""
    kernel: Matrix
    """The same for the kernel (G)."""
    back: Matrix
    """The same for the products (A^T)."""
    sums: bool
    """Change the basis by sums of few parts, and multiply matrix by matrix; otherwise do each as one large product:
    with 36 parts the sums take longer than they save, or the compiler does."""


F2 = Form(
    2, 2,
    ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
    ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1)),
    ((1, 1, 1, 0), (0, 1, -1, -1)),
    sums=True,
)  # fmt: skip
"""Four multiplications a result (section 4.1)."""

F4 = Form(
    4, 4,
    ((4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
     (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1)),
    ((1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
     (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1)),
    ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1)),
    sums=False,
)  # fmt: skip
"""Two and a quarter (section 4.2)."""

TWICE = Form(
    2, 1,
    ((1, -1, 0), (0, 1, 0), (0, 1, -1)),
    ((1, 0, 0), (1, 1, 1), (0, 0, 1)),
    ((1, 1, 0), (0, 1, -1)),
    sums=True,
)  # fmt: skip
"""For a picture with every number twice along both axes, given before they are repeated. Along one axis, a number s of
it between p and n, with the kernel a, b, c, has the results a p + (b + c) s = (p - s) a + s (a + b + c) and
(a + b) s + c n = s (a + b + c) - (s - n) c: three multiplications for two, nine for four along both."""


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 I O"], form: Form, block: int,
    prologue: Prologue | None = None, epilogue: Epilogue | None = None, *, around: bool = False,
    reads: int = 0, over: int | None = None,
) -> Float[Array, "B h w O2"]:  # fmt: skip
    """The convolution with a padding of 1, block by block of tiles: about `block` values, of all channels, at once.

    The prologue is applied to each piece of `x` that is convolved, the epilogue to each piece of the result; `x` must
    have whole tiles for that. `around` takes the kernel turned round by half a turn, from its results to its inputs,
    as gradients do: nothing has to be written down for that.

    Of `x`, which may have more channels, it `reads` those from one on. The results are written `over` those from
    another one on, none of which it reads, and what comes back is `x` with them. Again that takes whole tiles.
    """
    moved_kernel = moved(kernel.astype(jnp.float32) * once(x), form, multiplied_in(x.dtype), around)
    return filtered(x, moved_kernel, form, block, prologue, epilogue, around=around, reads=reads, over=over)


def moved(kernel: Float[Array, "3 3 I O"], form: Form, dtype: jnp.dtype, around: bool = False) -> Parts:
    """The kernel in the basis of the form; with its lines and columns from the last to the first, `around`."""
    matrix = tuple(row[::-1] for row in form.kernel) if around else form.kernel
    return _narrow(changed(matrix, kernel.astype(jnp.float32), operator.getitem, form.sums), dtype)


def back(parts: Float[Array, "16 I O"]) -> Float[Array, "3 3 I O"]:
    """The kernel that is in the basis of `F2`, float32: its first and last line and the difference of the others."""
    square = parts.astype(jnp.float32).reshape(4, 4, *parts.shape[1:])
    lines = jnp.stack([square[0], square[1] - square[2], square[3]])
    return jnp.stack([lines[:, 0], lines[:, 1] - lines[:, 2], lines[:, 3]], axis=1)


def turned(parts: Float[Array, "16 I O"]) -> Float[Array, "16 O I"]:
    """In the basis of `F2` the kernel turned round by half a turn, from its results to its inputs."""
    square = parts.reshape(4, 4, *parts.shape[1:])
    around = np.array([3, 1, 2, 0])  # sums and differences of the outer numbers with the middle one stay
    return square[around][:, around].reshape(parts.shape).swapaxes(1, 2)


def filtered(
    x: Float[Array, "B H W C"], kernel: Parts, form: Form, block: int,
    prologue: Prologue | None = None, epilogue: Epilogue | None = None, *, around: bool = False,
    reads: int = 0, over: int | None = None,
) -> Float[Array, "B h w O2"]:  # fmt: skip
    """`convolve` with a kernel that is `moved`."""
    (batch, height, width, _), m, step = x.shape, form.m, form.step
    channels, results = kernel[0].shape[-2:][:: -1 if around else 1]
    across, down = -(-width // step), -(-height // step)
    tiles = max(block // channels, 1)
    rows = _rows_of(down, max(1, min(down, tiles // across)), whole=epilogue is not None)
    blocks = -(-down // rows)
    several = _divisor(batch, tiles // (down * across)) if blocks == 1 else 1
    picture, within = packed(x), multiplied_in(x.dtype)
    size, below, right = rows * step + 2, blocks * rows * step + 1 - height, across * step + 1 - width
    high, zero = min(size, height), jnp.uint32(0)  # without a sign: nothing is computed for places below zero

    def treated(part: Shaped[Array, "b h w C"], first: Array) -> Shaped[Array, "b h w D"]:
        return part if prologue is None else packed(prologue(unpacked(part, x.dtype), first))

    def cut(picture: Shaped[Array, "B H W C"], first: Array, line: Array) -> Shaped[Array, "b h w I"]:
        """A block's lines from the one above `line` on, with zeros around the picture: of the whole picture no copy is
        made for them. Where there are many blocks, each lies in memory, and sums are not made of its place, too."""
        if blocks == 1:
            some = picture if several == batch else lax.dynamic_slice_in_dim(picture, first, several)
            some = treated(some[..., reads : reads + channels], first)
            return jnp.pad(some, ((0, 0), (1, below), (1, right), (0, 0)))
        top, last = jnp.clip(line, 1, height - high + 1) - 1, jnp.uint32(reads)
        part = treated(lax.dynamic_slice(picture, (first, top, zero, last), (several, high, width, channels)), first)
        empty = jnp.zeros((several, below + size + 1, width + 1 + right, part.shape[-1]), picture.dtype)
        laid = lax.dynamic_update_slice(empty, part, (zero, below + 1 + top - line, zero + 1, zero))
        return laid[:, below:]

    def lines(part: Shaped[Array, "b h w C"]) -> tuple[Any, Callable[[Any, int], Array]]:
        """The values of all tiles as `changed` takes them."""
        places, columns = (
            [slice(i, i + (count - 1) * step + 1, step) for i in range(len(form.data))] for count in (rows, across)
        )
        if form.sums:
            return [unpacked(part[:, i], x.dtype) for i in places], lambda line, j: line[:, :, columns[j]]
        return _square(jnp.stack([unpacked(part[:, i, j], x.dtype) for i in places for j in columns])), operator.getitem

    def one(number: Array, out: Shaped[Array, "B h w O"]) -> Shaped[Array, "B h w O"]:
        number = jnp.asarray(number, zero.dtype)
        first, row = number // blocks * several, number % blocks * rows
        grid = changed(form.data, *lines(cut(picture if over is None else out, first, row * step)), form.sums)
        products = multiplied(_rows(_narrow(grid, within)), kernel, around)
        made = _stacked(_narrow(changed(form.back, _square(products), operator.getitem, form.sums), x.dtype))
        made = made.reshape(m, m, several, rows, across, -1).transpose(2, 3, 0, 4, 1, 5)
        made = made.reshape(several, rows * m, across * m, -1)
        place = first, row * m, zero, jnp.uint32(over or 0)
        lying = None if over is None else unpacked(lax.dynamic_slice(out, place, made.shape), x.dtype)
        made = packed(made if epilogue is None else epilogue(made, first, row * m, lying))
        return lax.dynamic_update_slice(out, made if over is None else together((made,))[0], place)

    if over is None:
        # A place for each layer's results: of equal zeros the compiler would make one, and keep it for copies.
        out = after(x, jnp.zeros((batch, blocks * rows * m, across * m, results), picture.dtype))
    else:
        out = picture
    out = lax.fori_loop(0, batch // several * blocks, one, out)
    return unpacked(out[:, : height * m // step, : width * m // step], x.dtype)


def changed(matrix: Matrix, lines: Any, column: Callable[[Any, int], Array], sums: bool) -> Parts:
    """`matrix` P `matrix`^T for a square P of arrays, float32. The arrays of each line are what `column`
    takes out of it. Sums are made of lines before columns are taken out of them: that is the shorter program. Without
    sums all of P is one array."""
    if not sums:
        both = np.kron(np.array(matrix), np.array(matrix)).astype(np.float32)
        stack = lines.astype(jnp.float32).reshape(both.shape[1], -1)
        return jnp.dot(both, stack).reshape(-1, *lines.shape[2:])
    wide = jax.tree.map(lambda part: part.astype(jnp.float32), list(lines))
    made = [jax.tree.map(lambda *parts, row=row: combined(row, parts), *wide) for row in matrix]
    return [combined(row, [column(line, j) for j in range(len(row))]) for line in made for row in matrix]


def multiplied(some: Parts, others: Parts, around: bool = False) -> Parts:
    """The products [T, O] of matrices [T, I] and [I, O] (or, `around`, [O, I]), pair by pair, float32: one by one, or
    stacked at once."""
    if isinstance(some, list):
        along = (((1,), (int(around),)), ((), ()))
        return [
            lax.dot_general(one, other, along, preferred_element_type=jnp.float32)
            for one, other in zip(some, others, strict=True)
        ]
    along = (((2,), (1 + around,)), ((0,), (0,)))
    return lax.dot_general(some, others, along, preferred_element_type=jnp.float32)


def combined(row: Sequence[float], parts: Sequence[Array]) -> Array:
    """The sum of the parts, each times its factor, with as few multiplications as that takes."""
    sizes = {abs(factor) for factor in row if factor}
    common = sizes.pop() if len(sizes) == 1 else 1
    terms = [(factor / common, part) for factor, part in zip(row, parts, strict=True) if factor]

    def times(factor: float, part: Array) -> Array:
        if abs(factor) == 1:
            return part if factor > 0 else -part
        return factor * part

    total = times(*terms[0])
    for factor, part in terms[1:]:
        total = total + times(factor, part) if factor > 0 else total - times(-factor, part)
    return times(common, total)


def _square(parts: Parts) -> Any:
    """Parts line by line."""
    size = math.isqrt(len(parts))
    if isinstance(parts, list):
        return [parts[i : i + size] for i in range(0, len(parts), size)]
    return parts.reshape(size, size, *parts.shape[1:])


def _rows(parts: Parts) -> Parts:
    """Each part as rows of channels."""
    if isinstance(parts, list):
        return [part.reshape(-1, part.shape[-1]) for part in parts]
    return parts.reshape(len(parts), -1, parts.shape[-1])


def _stacked(parts: Parts) -> Array:
    return jnp.stack(parts) if isinstance(parts, list) else parts


def _narrow(parts: Parts, dtype: jnp.dtype) -> Parts:
    return [part.astype(dtype) for part in parts] if isinstance(parts, list) else parts.astype(dtype)


def _rows_of(down: int, most: int, whole: bool) -> int:
    """How many of `down` rows of tiles a block has, at most `most`: in `whole` blocks, or in as even ones as can be."""
    return _divisor(down, most) if whole else -(-down // -(-down // most))


def _divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is not above `most`, or 1."""
    return next((each for each in range(min(number, max(most, 1)), 0, -1) if number % each == 0), 1)
