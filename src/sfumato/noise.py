"""Seeded noise, one picture at a time: what a picture starts from depends on its own seed and on nothing else.

The numbers come from counters (Threefry, https://doi.org/10.1145/2063384.2063405), so that they are the same for any
batch, order and number of devices. `torch_cpu` gives those of PyTorch on CPU instead.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt32

from sfumato.errors import SfumatoError

START, STEP, ENCODE = range(3)
"""Streams of a seed that have nothing to do with each other: starting latents, noise of the sampler's steps, and
draws of an autoencoder's posterior."""

SEEDS = 2**63

Seeds = Iterable[Any]
"""Whole numbers, one for each picture; anything else is refused."""

Shape = tuple[int, int, int]
"""Height, width and channels of the latents of one picture."""


def checked(seeds: Seeds) -> list[int]:
    """The seeds as plain integers. Raises SfumatoError for anything but integers from 0 to 2^63 - 1."""
    good = []
    for seed in seeds:
        try:
            number = -1 if isinstance(seed, bool) else operator.index(seed)
        except TypeError:
            number = -1
        if not 0 <= number < SEEDS:
            raise SfumatoError(f"A seed must be a whole number from 0 to 2^63 - 1, not {seed!r}.")
        good.append(number)
    return good


def starting(seeds: Seeds, shape: Shape, *, stream: int = START) -> Float32[Array, "B h w C"]:
    """Standard normal noise, one picture for each seed. Raises SfumatoError as `checked`."""
    return _pictures(seeds, stream, None, shape)


def per_step(seeds: Seeds, rows: int, shape: Shape) -> Float32[Array, "rows B h w C"]:
    """Standard normal noise for every row of a sampler's table; row i is the same however many rows there are.

    Raises SfumatoError as `checked`.
    """
    return _pictures(seeds, STEP, rows, shape)


def _pictures(seeds: Seeds, stream: int, rows: int | None, shape: Shape) -> Float32[Array, "... B h w C"]:
    # One program a picture, not one for all: vectorized ends of a larger array might round otherwise.
    draws = [_draw(_halves(seed), stream, rows, shape) for seed in checked(seeds)]
    return jnp.concatenate(draws, axis=-4) if len(draws) > 1 else draws[0]


def _halves(seed: int) -> UInt32[np.ndarray, 2]:
    """The key of a seed, of which `jax.random.key` would drop the upper half where 64-bit types are off."""
    return np.array([seed >> 32, seed & 0xFFFFFFFF], np.uint32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw(seed: UInt32[Array, 2], stream: int | Array, rows: int | None, shape: Shape) -> Float32[Array, "... 1 h w C"]:
    key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), stream)
    if rows is None:
        return jax.random.normal(key, shape, jnp.float32)[None]
    draws = jax.lax.map(lambda row: jax.random.normal(jax.random.fold_in(key, row), shape), jnp.arange(rows))
    return draws[:, None]


def torch_cpu(seeds: Seeds, shape: Shape, *, draws: int | None = None) -> Float32[np.ndarray, "... B h w C"]:
    """The noise of `torch.randn((C, h, w), generator=torch.Generator().manual_seed(seed))`, one picture a seed.

    With `draws` it is that many draws one after another, as first axis: torch pipelines take the starting latents
    first and then the noise of every step. Equal to 1e-6, because torch's fast logarithm and cosine differ from exact
    ones in the last bit. torch on GPU draws other numbers. Raises SfumatoError as `checked`.
    """
    height, width, channels = shape
    pictures = []
    for generator in map(_TorchGenerator, checked(seeds)):
        picture = np.stack([generator.normal(height * width * channels) for _ in range(draws or 1)])
        pictures.append(picture.reshape(-1, channels, height, width))
    noise = np.moveaxis(np.stack(pictures, axis=1), 2, -1)
    return noise if draws is not None else noise[0]


class _TorchGenerator:
    """The normal distribution of PyTorch's CPU generator: mt19937 with the transform of Box and Muller.

    As in aten/src/ATen/native/cpu/DistributionTemplates.h (16 numbers and more) and ATen/core/DistributionsHelper.h
    (fewer) of PyTorch 2.
    """

    def __init__(self, seed: int):
        self.words = np.random.RandomState(seed & 0xFFFFFFFF)  # of the seed, torch reads the lower half
        self.kept: float | None = None

    def normal(self, count: int) -> Float32[np.ndarray, " count"]:
        """The next draw of an array of `count` numbers."""
        if count < 16:
            return np.array([self._one() for _ in range(count)], np.float32)
        uniform = self._uniform(count)
        whole = count - count % 16
        numbers = np.concatenate([_box_muller(uniform[:whole]), uniform[whole:]])
        if count % 16:
            numbers[-16:] = _box_muller(self._uniform(16))
        return numbers

    def _uniform(self, count: int) -> Float32[np.ndarray, " count"]:
        """24 bits of each word, in [0, 1)."""
        words = np.frombuffer(self.words.bytes(4 * count), "<u4")
        return (words & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        """One number in double precision; the transform makes two, and the second waits."""
        if self.kept is not None:
            number, self.kept = self.kept, None
            return number
        high, low = np.frombuffer(self.words.bytes(16), "<u4").astype(np.uint64).reshape(2, 2).T
        u1, u2 = (((high << np.uint64(32)) | low) & np.uint64(2**53 - 1)) / 2.0**53
        radius, angle = np.sqrt(-2 * np.log1p(-u2)), 2 * np.pi * u1
        self.kept = float(radius * np.sin(angle))
        return float(radius * np.cos(angle))


def _box_muller(uniform: Float32[np.ndarray, " count"]) -> Float32[np.ndarray, " count"]:
    """Normal numbers out of uniform ones, in blocks of 16 (https://doi.org/10.1214/aoms/1177706645)."""
    u1, u2 = np.moveaxis(uniform.reshape(-1, 2, 8), 1, 0)
    radius, angle = np.sqrt(-2 * np.log(1 - u1)), np.float32(2 * np.pi) * u2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
