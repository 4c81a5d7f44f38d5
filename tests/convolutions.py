"""Pictures and kernels, and how far results of convolutions are apart."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

BOUNDS = {"float32": 1e-4, "bfloat16": 4e-2}
"""By type: how far a result may be off."""


def example(shape, dtype="float32"):
    batch, height, width, inputs, outputs = shape
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, inputs))
    kernel = rng.standard_normal((3, 3, inputs, outputs)) * (9 * inputs) ** -0.5
    return jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)


def gap(found, wanted):
    found, wanted = (np.asarray(each, np.float32) for each in (found, wanted))
    return np.abs(found - wanted).max() / wanted.std()
