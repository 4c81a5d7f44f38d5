"""Convolutions of pictures that are doubled first."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from sfumato.models.kernels import winograd
from sfumato.models.kernels.convolution import LARGEST, LAST, SAME, block_of, conv_general_dilated, has_forms
from sfumato.models.kernels.products import plus


def twice(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Each number twice along height and width."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


def conv_of_doubled(
    x: Float[Array, "B H W I"], kernel: Float[Array, "3 3 I O"], bias: Float[Array, " O"] | None = None
) -> Float[Array, "B h w O"]:
    """The convolution, with a padding of 1, of the picture `twice` as high and wide as `x`, and a bias added to it.

    A processor does not make that picture, and makes a quarter of the products (`winograd.TWICE`).
    """
    x, kernel = (each.astype(jnp.result_type(x, kernel)) for each in (x, kernel))
    if has_forms(kernel.shape, x.dtype) and x.size <= LARGEST:
        return _doubled(x, kernel, bias)
    return _plain(x, kernel, bias)


def _plain(x: Array, kernel: Array, bias: Array | None) -> Array:
    y = conv_general_dilated(twice(x), kernel, (1, 1), SAME, dimension_numbers=LAST)
    return y if bias is None else plus(y, bias)


@jax.custom_vjp
def _doubled(x: Array, kernel: Array, bias: Array | None) -> Array:
    """By the form on a processor, with the gradients of `_plain`."""
    return lax.platform_dependent(x, kernel, bias, cpu=_on_processor, default=_plain)


def _on_processor(x: Array, kernel: Array, bias: Array | None) -> Array:
    def biased(made: Float[Array, "b h w O"], *_: Any) -> Float[Array, "b h w O"]:
        return made if bias is None else plus(made, bias)

    return winograd.convolve(x, kernel, winograd.TWICE, block_of(x), epilogue=biased)


_doubled.defvjp(lambda *given: (_doubled(*given), given), lambda given, gradient: jax.vjp(_plain, *given)[1](gradient))
