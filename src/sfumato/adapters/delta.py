"""What an adapter changes in one layer: a low-rank matrix and its relatives, as pytrees.

The arrays are kept as files have them, in torch's layout (outputs first: [O, I] for a dense layer, [O, I, kh, kw] for a
convolution, R the rank); `matrix` gives the change of a kernel of ours. `scale` is alpha / rank, worked out by whoever
reads the file. The formulas are those of LoRA (arXiv:2106.09685, section 4.1), of LyCORIS (arXiv:2309.14859, section 3)
for its relatives, and of DoRA (arXiv:2402.09353, eq. 5).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sfumato.types import Numbers, pytree

if TYPE_CHECKING:
    Scale = float | Array
else:
    Scale = float | Float[Numbers, ""]

TINY = 1e-24
"""Keeps the length of an empty column away from zero."""


class Delta(ABC):
    """The change of one layer."""

    magnitude: Float[Numbers, " ..."] | None
    """DoRA: the length of each column of the changed kernel, one for each output ([O] or [O, 1, ...]) or, as LyCORIS
    and OneTrainer also write it, for each input ([1, I, ...])."""
    bias: Float[Numbers, " O"] | None = None
    """The change of the layer's bias at strength 1."""

    @property
    @abstractmethod
    def rank(self) -> int | None:
        """The rank of the factors; None where there are none."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the change in torch's layout; the inputs and sides of a convolution may be one axis."""

    @abstractmethod
    def weight(self) -> Float[Array, " ..."]:
        """The change at strength 1 in torch's layout, float32, of the shape `shape`."""

    def matrix(self, shape: tuple[int, ...] | None = None) -> Float[Array, " ..."]:
        """The change of our `kernel` at strength 1, float32: [I, O] or [kh, kw, I, O].

        `shape` is that of the kernel; without it the arrays' own shapes decide. Parameters of norms, which have one
        axis, stay as they are. A magnitude has no part in it: see `changed`.
        """
        with jax.default_matmul_precision("highest"):
            return turned(self.weight(), shape)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """Why this cannot change a parameter of ours of this shape, in words; None if it can."""
        wanted = stored(shape)
        if _without_ones(self.shape) != _without_ones(wanted) and self.shape != _flat_shape(wanted):
            return f"it changes a weight of {list(self.shape)} and the layer has {list(wanted)}"
        leaves, structure = jax.tree.flatten(self)
        shapes = tuple(np.shape(leaf) for leaf in leaves)
        if not _together(structure, shapes):
            return f"its factors of {', '.join(str(list(shape)) for shape in shapes if shape)} do not go together"
        if self.magnitude is not None and np.size(self.magnitude) != wanted[self._by_input(wanted[0])]:
            return f"its magnitude has {list(self.magnitude.shape)} numbers and the layer's weight is {list(wanted)}"
        return None

    def _by_input(self, outputs: int) -> bool:
        """Whether the magnitude is that of the inputs' columns."""
        return self.magnitude is not None and np.ndim(self.magnitude) > 1 and self.magnitude.shape[0] != outputs


def changed(kernel: Float[Array, "*shape"], delta: Delta, strength: Float[Array, ""]) -> Float[Array, "*shape"]:
    """`kernel` (ours: [I, O] or [kh, kw, I, O]) with a delta of this strength, float32 or wider.

    With a magnitude m it is DoRA's m (W + strength dW) / |W + strength dW| (arXiv:2402.09353, eq. 5): the strength
    scales the direction and the magnitude takes part in full, as in PEFT, so a small strength is no small change.
    Other programs interpolate between W and the result instead. The length is a constant to the gradient (section 4.3).
    Strength 0 leaves the kernel as it is, in any case.
    """
    before = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
    after = before + strength * delta.matrix(kernel.shape)
    if delta.magnitude is not None:
        kept = after.ndim - 1 - delta._by_input(kernel.shape[-1])
        others = [axis for axis in range(after.ndim) if axis != kept]
        length = jnp.sqrt((after**2).sum(others, keepdims=True) + TINY)
        after *= jnp.asarray(delta.magnitude, after.dtype).reshape(length.shape) / jax.lax.stop_gradient(length)
    return jnp.where(strength == 0, before, after)


def turned(weight: Float[Array, " ..."], shape: tuple[int, ...] | None = None) -> Float[Array, " ..."]:
    """A weight in torch's layout as a parameter of ours, of the shape `shape` where sides or ones are missing."""
    if weight.ndim < 2:
        return weight
    weight = weight if shape is None else weight.reshape(stored(shape))
    return weight.transpose((*range(2, weight.ndim), 1, 0))


def stored(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape on disk of a parameter of ours: outputs, inputs, then the sides of a convolution."""
    return shape if len(shape) < 2 else (shape[-1], shape[-2], *shape[:-2])


@pytree
class LowRank(Delta):
    """scale up down: LoRA, and LoCon for convolutions, where `down` has the sides and `up` is 1 x 1.

    With `mid` [R, R, kh, kw] it is LoCon's Tucker form, where `down` is 1 x 1 as well.
    """

    down: Float[Numbers, "_ _ *k"]
    up: Float[Numbers, "_ _ *one"]
    mid: Float[Numbers, "R R kh kw"] | None = None
    scale: Scale = 1.0
    magnitude: Float[Numbers, " ..."] | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        sides = self.down.shape[2:] if self.mid is None else self.mid.shape[2:]
        return (self.up.shape[0], self.down.shape[1], *sides)

    def weight(self) -> Float[Array, "O I *k"]:
        down, up, mid = wide(self.down), _flat(wide(self.up)), self.mid
        if mid is not None:
            return constant(self.scale) * tucker(wide(mid), up.T, _flat(down))
        return (constant(self.scale) * (up @ _flat(down))).reshape(self.shape)


@pytree
class LoHa(Delta):
    """scale (w1_a w1_b) * (w2_a w2_b), an elementwise product of two low-rank matrices (arXiv:2108.06098).

    With the cores `t1` and `t2` [rank, rank, kh, kw] each is in Tucker form, where `a` is [rank, O] and `b` [rank, I].
    """

    w1_a: Float[Numbers, "_ _"]
    w1_b: Float[Numbers, "_ _"]
    w2_a: Float[Numbers, "_ _"]
    w2_b: Float[Numbers, "_ _"]
    t1: Float[Numbers, "R R kh kw"] | None = None
    t2: Float[Numbers, "S S kh kw"] | None = None
    scale: Scale = 1.0
    magnitude: Float[Numbers, " ..."] | None = None

    @property
    def rank(self) -> int:
        return self.w1_b.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        if self.t1 is None:
            return (self.w1_a.shape[0], self.w1_b.shape[1])
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    def weight(self) -> Float[Array, " O *rest"]:
        first = product(self.w1_a, self.w1_b, self.t1)
        return constant(self.scale) * first * product(self.w2_a, self.w2_b, self.t2)


@pytree
class LoKr(Delta):
    """scale w1 (x) w2, a Kronecker product, where each factor is whole or low-rank itself (w_a w_b).

    `w2` may have the sides of a convolution, and its low-rank form a core `t2` as in LoHa.
    """

    w1: Float[Numbers, "_ _ *one"] | None = None
    w1_a: Float[Numbers, "_ _"] | None = None
    w1_b: Float[Numbers, "_ _"] | None = None
    w2: Float[Numbers, "_ _ *k"] | None = None
    w2_a: Float[Numbers, "_ _"] | None = None
    w2_b: Float[Numbers, "_ _"] | None = None
    t2: Float[Numbers, "R R kh kw"] | None = None
    scale: Scale = 1.0
    magnitude: Float[Numbers, " ..."] | None = None

    @property
    def rank(self) -> int | None:
        return next((w.shape[0] for w in (self.w2_b, self.w1_b) if w is not None), None)

    @property
    def shape(self) -> tuple[int, ...]:
        first = _product_shape(self.w1, self.w1_a, self.w1_b, None)
        second = _product_shape(self.w2, self.w2_a, self.w2_b, self.t2)
        return (first[0] * second[0], first[1] * second[1], *second[2:])

    def weight(self) -> Float[Array, " O *rest"]:
        first = product(self.w1_a, self.w1_b) if self.w1 is None else wide(self.w1)
        second = product(self.w2_a, self.w2_b, self.t2) if self.w2 is None else wide(self.w2)
        return constant(self.scale) * jnp.kron(first.reshape(*first.shape[:2], *[1] * (second.ndim - 2)), second)


@pytree
class Full(Delta):
    """The whole difference of a layer's weight, and of its bias; one of them may be missing."""

    diff: Float[Numbers, " ..."] | None = None
    bias: Float[Numbers, " O"] | None = None
    magnitude: Float[Numbers, " ..."] | None = None

    @property
    def rank(self) -> None:
        return None

    @property
    def shape(self) -> tuple[int, ...]:
        return () if self.diff is None else self.diff.shape

    def weight(self) -> Float[Array, " ..."]:
        return jnp.zeros(()) if self.diff is None else wide(self.diff)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        return None if self.diff is None else super().misfit(shape)


def wide(a: Any) -> Float[Array, " ..."]:
    """float32, or wider."""
    return jnp.asarray(a, jnp.promote_types(a.dtype, jnp.float32))


def constant(scale: Any) -> Float[Array, ""]:
    """The scale, which training does not change."""
    return jax.lax.stop_gradient(jnp.asarray(scale, jnp.float32))


def product(a: Any, b: Any, core: Any = None) -> Float[Array, " ..."]:
    """a b, or with a core its Tucker form."""
    return wide(a) @ wide(b) if core is None else tucker(wide(core), wide(a), wide(b))


def tucker(
    core: Float[Array, "i j kh kw"], a: Float[Array, "i O"], b: Float[Array, "j I"]
) -> Float[Array, "O I kh kw"]:
    """The kernel of a core and its factors (arXiv:2309.14859, eq. 5)."""
    return jnp.einsum("ijkl,io,jn->onkl", core, a, b)


@functools.lru_cache(maxsize=1024)  # tracing takes a while, and the layers of a network have few shapes
def _together(structure: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    """Whether the factors of a delta have shapes that can be multiplied."""
    leaves = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    try:
        jax.eval_shape(lambda leaves: jax.tree.unflatten(structure, leaves).weight(), leaves)
    except (TypeError, ValueError):
        return False
    return True


def _product_shape(whole: Any, a: Any, b: Any, core: Any) -> tuple[int, ...]:
    if whole is not None:
        return whole.shape
    return (a.shape[0], b.shape[1]) if core is None else (a.shape[1], b.shape[1], *core.shape[2:])


def _flat(a: Float[Array, " A *rest"]) -> Float[Array, "A _"]:
    return a.reshape(len(a), -1)


def _flat_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) < 2 else (shape[0], int(np.prod(shape[1:])))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1 x 1 convolution's shape is that of a dense layer, in whichever way it is stored."""
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape
