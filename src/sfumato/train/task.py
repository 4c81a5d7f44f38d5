"""What a recipe makes of a model and its settings: all that the training loop has to know."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sfumato.adapters.live import copied
from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.models.held import held
from sfumato.train.samples import Sampling

T = TypeVar("T")
M = TypeVar("M", bound=nnx.Module)

Batch = Mapping[str, Any]
Metrics = dict[str, Float[Array, ""]]
Loss = Callable[[Any, Any, Batch, jax.Array], tuple[Float[Array, ""], Metrics]]


@dc.dataclass(frozen=True)
class Task:
    """A thing to be trained."""

    trainable: Any
    """A pytree of float32 master weights, on the host; nothing that stays as it is is in it."""
    frozen: Any
    """A pytree of what else the loss needs, in the type that is computed in. It may share arrays with the model that
    the task was made of, so it must never be donated."""
    loss: Loss
    """(trainable, frozen, batch, key) -> (mean over the batch, further figures by name), float32 scalars; pure."""
    collate: Callable[[Batch], dict[str, Any]]
    """From a batch of the data to what `loss` takes: numpy arrays with the pictures as first axis, texts tokenized."""
    export: Callable[[Any, Path], None]
    """(trainable, folder): writes what other programs load. The folder must not exist or be empty."""
    draw: Callable[[Any, Sampling], Images]
    """(trainable, wishes) -> pictures of the model with what is trained in it, in the order of the wishes. The arrays
    are whole (`shard.gather`), on the host or on one device. Drawing again with others of their shapes compiles
    nothing."""


def masters(tree: T) -> T:
    """A float32 copy on the host. It shares no memory with `tree`, so training may overwrite it."""
    return jax.tree.map(lambda a: np.array(a, np.float32), tree)


def check_float(*networks: nnx.Module) -> None:
    """Raises SfumatoError for kernels that are int8 or prepared, which have no gradient."""
    kind = next(filter(None, map(held, networks)), None)
    if kind is not None:
        raise SfumatoError(
            f"The kernels of this model are {kind.form} and cannot be trained; train it as it was before."
        )


def cast(tree: T, dtype: Any) -> T:
    """The same with all floating-point arrays in `dtype`; gradients arrive in the type from before."""

    def convert(a: Any) -> Any:
        return jnp.asarray(a, dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a

    return jax.tree.map(convert, tree)


def to_draw_with(trained: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """Networks that are trained, by component name, as sampling takes them: in `dtype`, without checkpointing."""
    return {name: checkpointed(cast(network, dtype), False) for name, network in trained.items()}


def checkpointed(network: M, remat: bool = True) -> M:
    """The network with gradient checkpointing on (or off) in all of its parts that have it; arrays are shared."""
    network = copied(network)
    for _, module in nnx.iter_modules(network):
        if remat and hasattr(module, "remat"):
            module.remat = True  # type: ignore[attr-defined]
        elif "remat" in vars(module):
            del module.remat  # type: ignore[attr-defined]  # a network that has False is another one for jax
    return network


def fresh(network: M, seed: int) -> M:
    """A network of the same configuration with new random numbers, float32; `network` may be abstract."""
    return type(network)(network.config, rngs=nnx.Rngs(seed))  # type: ignore[attr-defined]


def filled(network: M, value: Callable[[tuple[Any, ...], tuple[int, ...]], Any]) -> M:
    """The network, which may be abstract, with `value(path, shape)` for each parameter."""
    graph, state = nnx.split(network)
    flat = [(path, leaf.replace(value(path, leaf.shape))) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(flat))


def values_of(network: nnx.Module) -> dict[tuple[Any, ...], np.ndarray]:
    """The parameters of a network by path, as float32 copies on the host. Raises SfumatoError for int8 kernels."""
    check_float(network)
    return {path: np.array(leaf[...], np.float32) for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))}
