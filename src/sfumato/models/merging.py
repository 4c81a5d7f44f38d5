"""Token merging in self-attention (ToMe for Stable Diffusion, arXiv:2303.17604, section 4; arXiv:2210.12461)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from sfumato.models.layers import precise


@dc.dataclass(frozen=True)
class Merge:
    """What goes round a layer that maps tokens to tokens: it sees fewer of them, and all get its results."""

    on: Bool[Array, ""]
    ratio: float
    """The share of tokens that go, rounded down; at most all but one of each 2 x 2 square."""
    size: tuple[int, int]
    """Height and width of the picture that the tokens are the positions of."""

    def __call__(
        self, layer: Callable[[Float[Array, "B _ D"]], Float[Array, "B _ D"]], x: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        """`layer(x)`, merged while `on`."""
        count = min(int(self.ratio * x.shape[1]), len(squares(self.size)[1]))
        if not count:
            return layer(x)

        def merged() -> Float[Array, "B Q D"]:
            place = places(x, self.size, count)
            return unmerge(layer(merge(x, place, x.shape[1] - count)), place)

        return lax.cond(self.on, merged, lambda: layer(x))


def squares(size: tuple[int, int]) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " S"]]:
    """The positions that others may be merged into, the first of each 2 x 2 square, and all others.

    The authors draw one of each square at random, anew in every row; here a picture depends on its seed alone.
    """
    down, right = np.divmod(np.arange(size[0] * size[1]), size[1])
    first = (down % 2 == 0) & (right % 2 == 0)
    return np.flatnonzero(first), np.flatnonzero(~first)


def places(x: Float[Array, "B Q D"], size: tuple[int, int], count: int) -> Int[Array, "B Q"]:
    """Which of the Q - `count` merged tokens each token becomes (bipartite soft matching, arXiv:2210.12461, section 3).

    Of those that are not the first of a square, the `count` that are most like some first one are merged into it;
    the others come before the first ones, the more alike the earlier. Likeness is the cosine.
    """
    targets, sources = squares(size)
    wide = precise(x)
    unit = wide * lax.rsqrt((wide**2).sum(-1, keepdims=True) + 1e-12)
    alike = jnp.einsum("bsd,btd->bst", unit[:, sources], unit[:, targets], precision=lax.Precision.HIGHEST)
    most = alike.max(-1)
    # As argmax, which takes ten times as long on a processor.
    nearest = jnp.where(alike == most[..., None], jnp.arange(len(targets)), len(targets)).min(-1)
    rank = jnp.argsort(jnp.argsort(-most, axis=-1), axis=-1)
    left = len(sources) - count
    moved = jnp.where(rank < count, left + nearest, rank - count)
    stay = jnp.broadcast_to(left + np.arange(len(targets)), (len(x), len(targets)))
    return jnp.concatenate([moved, stay], axis=1)[:, np.argsort(np.concatenate([sources, targets]))]


def merge(x: Float[Array, "B Q D"], place: Int[Array, "B Q"], tokens: int) -> Float[Array, "B M D"]:
    """The means of the tokens that share a place, float32 sums in the type of `x`."""
    wide = precise(x)

    def means(x: Float[Array, "Q D"], place: Int[Array, " Q"]) -> Float[Array, "M D"]:
        sums = jnp.zeros((tokens, x.shape[1]), x.dtype).at[place].add(x)
        return sums / jnp.zeros((tokens, 1), x.dtype).at[place].add(1)

    return jax.vmap(means)(wide, place).astype(x.dtype)


def unmerge(y: Float[Array, "B M D"], place: Int[Array, "B Q"]) -> Float[Array, "B Q D"]:
    """Every token gets what came out for the one that it was merged into."""
    return jnp.take_along_axis(y, place[:, :, None], axis=1)
