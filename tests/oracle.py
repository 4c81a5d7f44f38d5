"""The torch reference at the end of a wire: building it, filling ours from it, comparing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sfumato.io.fill import fill
from sfumato.io.tensors import LazyTensor
from sfumato.models.layers import abstract

M = TypeVar("M", bound=nnx.Module)


def seeded(factory: Callable[[], Any], seed: int = 0) -> Any:
    """A torch module in eval mode whose every parameter is random: zero and one starts would hide mistakes."""
    import torch

    torch.manual_seed(seed)
    module = factory().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim < 2 or not parameter.any():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return module


def lazy(state: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """A torch state dict as tensors that sfumato can read."""
    return {key: LazyTensor.of(value.detach().numpy()) for key, value in state.items()}


def fill_from_torch(network: Callable[..., M], config: Any, module: Any) -> M:
    """Our `network` of `config` with the reference's weights, float32; any key without a partner is an error."""
    return fill(abstract(network, config), lazy(module.state_dict()))


def fresh(network: Callable[..., M], config: Any, seed: int = 0) -> M:
    """Our `network` of `config` with random numbers from numpy: jax's initializers take long to compile."""
    rng = np.random.default_rng(seed)

    def draw(parameter: jax.ShapeDtypeStruct) -> jax.Array:
        if len(parameter.shape) == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, parameter.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(parameter.shape) / np.prod(parameter.shape[:-1]) ** 0.5, jnp.float32)

    return jax.tree.map(draw, abstract(network, config))


def to_torch(x: Any) -> Any:
    """[B H W C] -> torch [B C H W]; other ranks keep their axes."""
    import torch

    x = np.asarray(x)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1) if x.ndim == 4 else x))


def from_torch(x: Any) -> np.ndarray:
    """torch [B C H W] -> [B H W C]; other ranks keep their axes."""
    x = x.detach().numpy()
    return np.moveaxis(x, 1, -1) if x.ndim == 4 else x


def assert_close(ours: Any, theirs: Any, tol: float = 1e-4) -> None:
    """The largest difference is at most `tol` of the reference's range."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape, f"{ours.shape} != {theirs.shape}"
    extent = float(theirs.max() - theirs.min())
    assert extent > 1e-3, "the reference is constant, so it would prove nothing"
    worst = float(np.abs(ours - theirs).max()) / extent
    assert worst <= tol, f"differs by {worst:.2e} of the range, allowed {tol:.0e}"
