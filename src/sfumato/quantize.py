"""`quantize`: a model that takes less memory."""

from __future__ import annotations

import dataclasses as dc
from typing import Any, TypeVar

from flax import nnx

from sfumato.adapters.live import replaced
from sfumato.errors import SfumatoError
from sfumato.model import Model
from sfumato.models.controlnet import ControlNet
from sfumato.models.held import Held, held
from sfumato.models.int8 import Int8

K = TypeVar("K", Model, ControlNet)
N = TypeVar("N", bound=nnx.Module)

KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "controlnet_cond_embedding")
"""Parts that stay as they are: what goes in and comes out."""


def quantize(model: K) -> K:
    """A model (or ControlNet) like `model` that keeps the kernels of its layers as int8; the one given stays as it is.

    Every dense layer and convolution of the UNet and the text encoders, but for the first and last ones (`KEPT`), has
    whole numbers from -127 to 127 and one scale for each output channel, w ~ q scale with scale = max |w| / 127. What
    else there is (norms, biases, embeddings, the autoencoder) stays, and so does the type that is computed in: kernels
    are turned back where they are used, one at a time; controls that ask for gradients hold all of them meanwhile.
    Until the model given is let go of, both are in memory.

    LoRAs that are merged come first; live ones may come before or after. Such a model is neither saved nor trained. One
    that is int8 already comes back as it is. Raises SfumatoError for what is no model, and for one that is prepared.
    """
    check_changeable(model, "quantized", Int8)
    if isinstance(model, ControlNet):
        return quantized(model)
    if held(model.unet) is not None:
        return model
    encoders = {name: quantized(encoder) for name, encoder in model.text_encoders.items()}
    return dc.replace(
        model, unet=quantized(model.unet), text_encoders=encoders, adapters=(*model.adapters, "int8 weights")
    )


def check_changeable(model: Any, done: str, kind: type[Held]) -> None:
    """Raises SfumatoError for what is neither a model nor a ControlNet, and for kernels in another form than `kind`'s.
    `done` says what is to be done."""
    if not isinstance(model, Model | ControlNet):
        raise SfumatoError(
            f"A model (sfumato.load) or a ControlNet (sfumato.load_controlnet) can be {done}, not a "
            f"{type(model).__name__}."
        )
    found = held(model.unet if isinstance(model, Model) else model)
    if found not in (None, kind):
        raise SfumatoError(f"The kernels of this model are {found.form}, so it cannot be {done}; take it as it was.")


def quantized(network: N) -> N:
    """The network with int8 kernels; the same one if it has some."""
    if held(network) is not None:
        return network
    return replaced(network, {
        ".".join(map(str, path)): Int8(module) for path, module in nnx.iter_modules(network)
        if isinstance(module, nnx.Linear | nnx.Conv) and path[0] not in KEPT
    })  # fmt: skip
