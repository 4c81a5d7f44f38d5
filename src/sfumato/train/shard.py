"""Where arrays lie: rows of a batch over the devices, weights on each of them or divided too (FSDP).

One axis of devices does both, as in ZeRO's third stage (arXiv:1910.02054): jit sees where its arguments lie, and the
compiler gathers a weight where it is used and scatters its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sfumato.errors import SfumatoError

DATA = "data"
SMALLEST = 2**14
"""Arrays of fewer numbers lie whole on each device: gathering them would cost more than keeping them."""


def connect(address: str | None = None, processes: int | None = None, index: int | None = None) -> None:
    """Joins this process with the others of the same run, before any device is used.

    `address` (host:port) is where process 0 listens. On TPU pods and in clusters that jax knows (Slurm, Kubernetes,
    Open MPI), nothing needs to be given.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(address, processes, index)
    except (RuntimeError, ValueError) as error:
        raise SfumatoError(f"The processes of this run do not find each other at {address}: {error}.") from error


def mesh_of(devices: Sequence[Any] | None = None) -> Mesh:
    """The devices that share a run (default: all devices of all processes), in one axis."""
    return Mesh(np.array(jax.devices() if devices is None else list(devices)), (DATA,))


def spec(shape: Sequence[int], devices: int, name: str = DATA) -> PartitionSpec:
    """How an array of this shape is divided over so many devices: along its largest axis that they divide evenly."""
    fitting = [axis for axis, length in enumerate(shape) if length % devices == 0]
    if not fitting or np.prod(shape) < SMALLEST:
        return PartitionSpec()
    axis = max(fitting, key=lambda axis: shape[axis])
    return PartitionSpec(*[None] * axis, name)


def layout(tree: Any, mesh: Mesh, *, fsdp: bool) -> Any:
    """For each array of `tree` (or its shape): where it lies. Whole on each device, or divided by `spec` for `fsdp`.

    A rule of shapes alone, so that an optimizer's moments lie where their weights lie.
    """
    (name,) = mesh.axis_names

    def of(leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec(np.shape(leaf), mesh.size, name) if fsdp else PartitionSpec())

    return jax.tree.map(of, tree)


def place(tree: Any, places: Any) -> Any:
    """The arrays of `tree`, which each process has whole, where `places` says."""

    def put(leaf: Any, place: NamedSharding) -> Any:
        if place.is_fully_addressable:
            return jax.device_put(leaf, place)
        value = np.asarray(leaf)
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    return jax.tree.map(put, tree, places)


def rows(batch: Any, mesh: Mesh, parts: int = 1) -> Any:
    """This process's rows of a batch [B ...] as arrays [parts, B * processes / parts, ...] divided over `mesh`.

    The whole batch is the rows of process 0, then those of process 1, and so on. Part i has every row whose number
    there is i modulo `parts`, so that the parts are the same for any number of processes and devices.

    Raises SfumatoError if the rows cannot be divided evenly.
    """
    counts = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(counts) != 1 or counts == {()}:
        raise SfumatoError(f"The arrays of a batch must all have one row an example, not {sorted(counts)} rows.")
    ((count,),) = counts
    local = max(1, sum(device.process_index == jax.process_index() for device in mesh.devices.flat))
    if count == 0 or count % (parts * local):
        over = f"{parts} parts on {local} devices" if parts > 1 else f"{local} devices"
        raise SfumatoError(
            f"A batch of {count} cannot be divided into {over}; make it a multiple of {parts * local}"
            f"{' or use fewer devices' if local > 1 else ''}."
        )
    place = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names[0]))

    def put(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        leaf = leaf.reshape(count // parts, parts, *leaf.shape[1:]).swapaxes(0, 1)
        return jax.make_array_from_process_local_data(place, leaf)

    return jax.tree.map(put, batch)


def gather(tree: Any) -> Any:
    """The arrays of `tree`, whole, as numpy arrays in every process; one after another, so that none is held twice."""

    def get(leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.is_fully_replicated:
            return np.array(leaf)
        mesh = leaf.sharding.mesh  # type: ignore[attr-defined]
        return np.array(jax.jit(lambda a: a, out_shardings=NamedSharding(mesh, PartitionSpec()))(leaf))

    return jax.tree.map(get, tree)
