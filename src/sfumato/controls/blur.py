"""Gaussian blur of arrays on the picture's grid."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64


def blurred(x: Float[Array, "B H W C"], radius: int, deviation: float) -> Float[Array, "B H W C"]:
    """`x` under a Gaussian of 2 `radius` + 1 pixels a side, reflected at its borders."""
    rows, columns = (jnp.asarray(gaussian(length, radius, deviation), x.dtype) for length in x.shape[1:3])
    return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, x, precision="highest")


def gaussian(length: int, radius: int, deviation: float) -> Float64[np.ndarray, "L L"]:
    """The matrix that blurs a row of pixels. A row shorter than the Gaussian is reflected more than once."""
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / deviation) ** 2)
    reflected = np.pad(np.eye(length), ((radius, radius), (0, 0)), mode="reflect")
    shifted = [reflected[i : i + length] for i in range(2 * radius + 1)]
    return np.tensordot(weights / weights.sum(), shifted, 1)
