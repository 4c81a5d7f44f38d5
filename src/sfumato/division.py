"""How pictures are divided over devices: each device works through the loop on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from sfumato.controls.base import Control
from sfumato.models.unet import UNet
from sfumato.types import Step

BATCH = "batch"
"""The mesh axis over which pictures are divided."""


def divided(
    run: Callable[..., Any],
    mesh: Mesh | None,
    unet: UNet,
    steps: Step,
    controls: Sequence[Control],
    carry: Any,
    base: Any,
) -> Any:
    """`run(unet, steps, controls, carry, base)` with the pictures divided over `mesh`; each device runs alone.

    Its result has the pictures as first axis of every array that has an axis.
    """
    if mesh is None:
        return run(unet, steps, controls, carry, base)
    paths, tree = jax.tree.flatten_with_path((unet, steps, controls, carry, base))
    specs = [_place(path, leaf, controls) for path, leaf in paths]
    results: list[Any] = []

    def flat(*leaves: Array) -> list[Array]:
        out, structure = jax.tree.flatten(run(*jax.tree.unflatten(tree, leaves)))
        results[:] = [structure]
        return out

    # The result is like the carry, or like its first part, the latents.
    shapes = [leaf for path, leaf in paths if path[0].idx == 3]
    out_specs = [_by_picture(leaf) for leaf in shapes]
    out = jax.shard_map(flat, mesh=mesh, in_specs=tuple(specs), out_specs=out_specs, check_vma=False)(
        *(leaf for _, leaf in paths)
    )
    return jax.tree.unflatten(results[0], out)


def _place(path: Any, leaf: Array, controls: Sequence[Control]) -> PartitionSpec:
    """How an argument of the loop lies on the devices: divided by pictures, or whole on each."""
    argument = ("unet", "steps", "controls", "carry", "base")[path[0].idx]
    if argument in ("carry", "base"):
        return _by_picture(leaf)
    if argument == "steps" and path[1].name == "noise":
        return PartitionSpec(*[None] * (leaf.ndim - 4), BATCH)
    if argument == "controls" and path[2].name in controls[path[1].idx].per_picture:
        return PartitionSpec(BATCH)
    return PartitionSpec()


def _by_picture(leaf: Array) -> PartitionSpec:
    return PartitionSpec(BATCH) if jnp.ndim(leaf) else PartitionSpec()
