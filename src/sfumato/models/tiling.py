"""Large pictures through the autoencoder in little memory: tile by tile, or one picture at a time.

Tiles overlap, and each fades in over its neighbours above and to the left. Normalization and attention see one tile
only, so the result is close to that of the whole picture but not the same. The scheme (which tiles, which weights) is
that of `enable_tiling` in diffusers 0.42, so results agree.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sfumato.errors import SfumatoError
from sfumato.models.tiny_vae import AutoencoderTiny
from sfumato.models.vae import AutoencoderKL, Gaussian


def tiled_decode(
    vae: AutoencoderKL | AutoencoderTiny, latents: Float[Array, "B h w Z"], tile: int = 64, overlap: float = 0.25
) -> Float[Array, "B H W C"]:
    """`vae.decode` by tiles of `tile` x `tile` latents, of which neighbours share the part `overlap`.

    Raises SfumatoError if `tile` and `overlap` give no whole number of shared latents, or more than half a tile.
    """
    return _tiled(vae.decode, latents, tile, _shared(tile, overlap), lambda n: n * vae.factor)


def tiled_encode(
    vae: AutoencoderKL, pixels: Float[Array, "B H W C"], noise: Float[Array, "B h w Z"] | None = None,
    tile: int = 64, overlap: float = 0.25,
) -> Float[Array, "B h w Z"]:  # fmt: skip
    """`vae.encode` by tiles that give `tile` x `tile` latents, of which neighbours share the part `overlap`.

    Raises SfumatoError as `tiled_decode` does, and for pictures that are no whole number of latents.
    """
    factor, shared = vae.factor, _shared(tile, overlap)
    if pixels.shape[1] % factor or pixels.shape[2] % factor:
        raise SfumatoError(
            f"A picture of {pixels.shape[1]} x {pixels.shape[2]} pixels cannot be encoded by tiles; "
            f"both sides must be multiples of {factor}."
        )
    moments = _tiled(vae.moments, pixels, tile * factor, shared * factor, lambda n: n // factor)
    found = Gaussian.of(moments)
    return vae.scale(found.mean if noise is None else found.sample(noise))


def sliced(fn: Callable[[Any], Any], batch: Any) -> Any:
    """`fn`, which takes and returns batches, applied to one picture at a time (arrays or trees of arrays)."""

    def one(picture: Any) -> Any:
        return jax.tree.map(lambda a: a[0], fn(jax.tree.map(lambda a: a[None], picture)))

    return jax.lax.map(one, batch)


def _shared(tile: int, overlap: float) -> int:
    shared = round(tile * overlap)
    if tile < 1 or not 0 <= 2 * shared <= tile or abs(shared - tile * overlap) > 1e-6:
        raise SfumatoError(
            f"Tiles of {tile} latents cannot overlap by {overlap:g} of their side: the shared part must be a whole "
            "number of latents and at most half a tile."
        )
    return shared


def _tiled(
    fn: Callable[[Array], Array], x: Float[Array, "B H W C"], tile: int, shared: int, resize: Callable[[int], int]
) -> Float[Array, "B h w D"]:
    """`fn` by tiles of side `tile`; `resize` tells what a length of its input becomes in its output."""
    if max(x.shape[1:3]) <= tile:
        return fn(x)
    rows, columns = (_spans(length, tile, tile - shared) for length in x.shape[1:3])
    tiles = _apply(fn, x, rows, columns)
    kept, fade = resize(tile - shared), resize(shared)
    lines = []
    for i in range(len(rows)):
        for j in range(len(columns)):
            # What is faded in is the neighbour's blended form, so the order of these lines matters in the corners.
            if i:
                tiles[i, j] = _faded(tiles[i - 1, j], tiles[i, j], fade, axis=1)
            if j:
                tiles[i, j] = _faded(tiles[i, j - 1], tiles[i, j], fade, axis=2)
        lines.append(jnp.concatenate([tiles[i, j][:, :kept, :kept] for j in range(len(columns))], axis=2))
    return jnp.concatenate(lines, axis=1)


def _spans(length: int, tile: int, step: int) -> list[tuple[int, int]]:
    """Start and length of each tile along one side; those that reach the end are cut off there."""
    return [(start, min(tile, length - start)) for start in range(0, length, step)]


def _apply(
    fn: Callable[[Array], Array], x: Array, rows: list[tuple[int, int]], columns: list[tuple[int, int]]
) -> dict[tuple[int, int], Array]:
    """`fn` of every tile by its row and column: one compiled body, run tile after tile, for each shape of tile."""
    shapes = defaultdict(list)
    for i, (_, height) in enumerate(rows):
        for j, (_, width) in enumerate(columns):
            shapes[height, width].append((i, j))
    found = {}
    for (height, width), places in shapes.items():

        def one(start: Int[Array, " 2"], size: tuple[int, int] = (height, width)) -> Array:
            origin = (0, start[0], start[1], 0)
            return fn(jax.lax.dynamic_slice(x, origin, (x.shape[0], *size, x.shape[3])))

        starts = jnp.array([(rows[i][0], columns[j][0]) for i, j in places])
        found |= dict(zip(places, jax.lax.map(one, starts), strict=True))
    return found


def _faded(
    before: Float[Array, "B _ _ C"], after: Float[Array, "B _ _ C"], fade: int, axis: int
) -> Float[Array, "B _ _ C"]:
    """`after`, whose first `fade` lines along `axis` come gradually out of the last ones of `before`."""
    fade = min(fade, before.shape[axis], after.shape[axis])
    if not fade:
        return after
    old = jax.lax.slice_in_dim(before, before.shape[axis] - fade, None, axis=axis)
    new, rest = jnp.split(after, [fade], axis=axis)
    weight = jnp.expand_dims(jnp.arange(fade, dtype=jnp.float32) / fade, [a for a in range(4) if a != axis])
    return jnp.concatenate([old + (new - old) * weight, rest], axis=axis)
