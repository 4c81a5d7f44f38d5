"""Latents of mean 0 and deviation 1, channel by channel, by a change of the autoencoder that no picture shows."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64

from sfumato.adapters.live import copied
from sfumato.errors import SfumatoError
from sfumato.model import Model
from sfumato.models.vae import AutoencoderKL
from sfumato.train.task import Batch


def standardised(model: Model, batches: Iterable[Batch]) -> Model:
    """The model with an autoencoder whose latents of the pictures in `batches` have mean 0 and deviation 1 by channel.

    Both are measured over all latents that "pixels" may get, the spread of each distribution included, and folded into
    `quant_conv` and `post_quant_conv`; scaling_factor is 1 and shift_factor none. Every loader of the format then
    gives the UNet such latents, and decode(encode(x)) is what it was, to the precision of the weights' type. A UNet
    that was trained before does not know the new latents. `batches` must come to an end.

    Raises SfumatoError for an autoencoder without these two layers, for no batches, and for latents that are constant
    or not finite.
    """
    check_foldable(model)
    vae = folded(model.vae, *statistics(model.vae, batches))
    return dc.replace(model, vae=vae)


def check_foldable(model: Model) -> None:
    """Raises SfumatoError if there is nothing that statistics could be folded into: the convolutions next to the
    latents pad them with zeros, which a shift would have to change too."""
    config = model.vae.config
    if not (config.use_quant_conv and config.use_post_quant_conv):
        raise SfumatoError(
            f"The autoencoder of {model.name or 'this model'} has no quant_conv and post_quant_conv to fold the "
            "latents' mean and deviation into."
        )


def statistics(
    vae: AutoencoderKL, batches: Iterable[Batch]
) -> tuple[Float64[np.ndarray, " Z"], Float64[np.ndarray, " Z"]]:
    """Mean and deviation of each channel of the unscaled latents that the pictures of all batches may get.

    Raises as `standardised`.
    """
    counts, parts = [], []
    for batch in batches:
        parts.append([np.asarray(part, np.float64) for part in _measured(vae, jnp.asarray(batch["pixels"]))])
        counts.append(np.prod(batch["pixels"].shape[:3]))
    if not counts:
        raise SfumatoError("Mean and deviation of latents are measured over at least one batch, and there is none.")
    means, variances = (np.stack(column) for column in zip(*parts, strict=True))
    mean = np.average(means, 0, counts)
    deviation = np.sqrt(np.average(variances + (means - mean) ** 2, 0, counts))
    if not (np.isfinite(deviation).all() and deviation.min() > 1e-6):
        raise SfumatoError(f"A channel of the latents is constant or not finite: their deviations are {deviation}.")
    return mean, deviation


@jax.jit
def _measured(vae: AutoencoderKL, pixels: Float[Array, "B H W 3"]) -> tuple[Float[Array, " Z"], Float[Array, " Z"]]:
    """Mean and variance by channel; the variance is that of the means and the mean of the variances."""
    found = vae.posterior(pixels)
    return found.mean.mean((0, 1, 2)), found.mean.var((0, 1, 2)) + jnp.exp(found.logvar).mean((0, 1, 2))


def folded(vae: AutoencoderKL, mean: Float64[np.ndarray, " Z"], deviation: Float64[np.ndarray, " Z"]) -> AutoencoderKL:
    """The autoencoder with (z - mean) / deviation for its unscaled latents z."""
    new, count = copied(vae), len(mean)
    new.config = dc.replace(vae.config, scaling_factor=1.0, shift_factor=None, latents_mean=None, latents_std=None)
    kernel, bias = (_numbers(parameter) for parameter in (vae.quant_conv.kernel, vae.quant_conv.bias))
    kernel[..., :count] /= deviation
    # After the means come the logarithms of the variances.
    bias[:count], bias[count:] = (bias[:count] - mean) / deviation, bias[count:] - 2 * np.log(deviation)
    _set(new.quant_conv, kernel, bias)
    kernel, bias = (_numbers(parameter) for parameter in (vae.post_quant_conv.kernel, vae.post_quant_conv.bias))
    _set(new.post_quant_conv, kernel * deviation[:, None], bias + mean @ kernel[0, 0])
    return new


def _numbers(parameter: Any) -> Float64[np.ndarray, ...]:
    return np.array(parameter[...], np.float64)


def _set(layer: Any, kernel: Float64[np.ndarray, ...], bias: Float64[np.ndarray, ...]) -> None:
    layer.kernel.set_value(jnp.asarray(kernel, layer.kernel.dtype))
    layer.bias.set_value(jnp.asarray(bias, layer.bias.dtype))
