"""LoRA and its relatives (arXiv:2106.09685) on whole models: `lora.apply(model, strength)` is another model."""

from __future__ import annotations

import dataclasses as dc
import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array

from sfumato.adapters.delta import Delta
from sfumato.adapters.live import Adapted, adapted, find, leaf_of, merged, replaced
from sfumato.controls.check import number
from sfumato.errors import MismatchError, SfumatoError
from sfumato.io.fill import slots
from sfumato.model import Model, family_of_config
from sfumato.models.controlnet import ControlNet
from sfumato.models.held import Held
from sfumato.types import pytree, static

K = TypeVar("K", Model, ControlNet)
N = TypeVar("N", bound=nnx.Module)
Deltas = Mapping[str, Delta]

DECODER = ("up_blocks.", "conv_norm_out", "conv_out")
"""The layers of a UNet that a ControlNet, which is its other half, does not have."""


@pytree
class Lora:
    """The changes that a file makes to a model. Where it came from is no leaf; everything else is."""

    layers: Mapping[str, Deltas]
    """By component ("unet", "text_encoder", "text_encoder_2", "controlnet"), then by checkpoint path of the layer."""
    embeddings: Mapping[str, Any] = dc.field(default_factory=dict)
    """New tokens that the file carries, as `Embedding`s by token."""
    report: Any = static(default=None)
    """What was found in the file."""

    def __repr__(self) -> str:
        parts = [f"{component}: {len(deltas)} layers" for component, deltas in self.layers.items()]
        return f"Lora({', '.join(parts + [f'token {token}' for token in self.embeddings])})"

    def apply(self, model: K, strength: Any = 1.0, *, unet: Any = None, text: Any = None, live: bool = False) -> K:
        """A model like `model` with these changes; the one given stays as it is, and shares all other arrays.

        `strength` is for all of it, `unet` (also a ControlNet's) and `text` for one side alone; 0 is without. Merged
        changes are worked out in float32 and kept in the type of the weights. With `live` they stay beside the
        weights instead: strengths are then data, so that another strength, or another LoRA of the same layers and
        ranks, compiles nothing, at the cost of a little time in each step. Several are applied one after another; the
        order matters for DoRA alone, which scales whatever weights it finds (`delta.changed` says what strength means
        there).

        A ControlNet takes what was trained on it, or the encoder half of what was trained on a UNet. The tokens in
        `embeddings` are not part of it. Raises MismatchError if layers or shapes do not fit, and SfumatoError for
        what is no strength and no model, and for kernels that are int8 or prepared, which nothing is merged into.
        """
        networks, layers = _networks(model), self._layers(model)
        for component, deltas in layers.items():
            _check(component, networks.get(component), deltas, _name(model))
            layers_of = (_layer(networks[component], path) for path in deltas)
            into = None if live else next((layer for layer in layers_of if isinstance(layer, Held)), None)
            if into is not None:
                raise SfumatoError(
                    f"A LoRA cannot be merged into {into.form} kernels: apply it first and {into.made_by} then, or "
                    "apply it with live=True."
                )
        done = dict(networks)
        for component, deltas in layers.items():
            own = text if component.startswith("text") else unet
            done[component] = _on(networks[component], deltas, _strength(strength if own is None else own), live)
        if isinstance(model, ControlNet):
            return done["controlnet"]
        applied = (*model.adapters, self._said(strength, unet, text))
        return dc.replace(model, unet=done.pop("unet"), text_encoders=done, adapters=applied)

    def _said(self, strength: Any, unet: Any, text: Any) -> str:
        """How it is named in the metadata of pictures."""
        name = self.report.path.name if self.report is not None else "LoRA"
        given = [value for value in (strength, unet, text) if value is not None and not isinstance(value, Tracer)]
        return f"{name} ({', '.join(f'{float(value):g}' for value in given)})"

    def _layers(self, model: Any) -> Mapping[str, Deltas]:
        """What is meant for such a model."""
        if not isinstance(model, ControlNet) or "controlnet" in self.layers:
            return self.layers
        deltas = {path: d for path, d in self.layers.get("unet", {}).items() if not path.startswith(DECODER)}
        if not deltas:
            raise MismatchError(f"This LoRA changes nothing that a ControlNet has, but only {', '.join(self.layers)}.")
        return {"controlnet": deltas}


def _networks(model: Any) -> dict[str, Any]:
    """The networks that can be changed, by component."""
    if isinstance(model, ControlNet):
        return {"controlnet": model}
    if isinstance(model, Model):
        return {"unet": model.unet, **model.text_encoders}
    raise SfumatoError(
        "A LoRA is applied to a model (sfumato.load) or a ControlNet (sfumato.load_controlnet), not to a "
        f"{type(model).__name__}."
    )


def _name(model: Model | ControlNet) -> str:
    if isinstance(model, ControlNet):
        return f"the ControlNet ({family_of_config(model.config).full_name})"
    return f"{model.name or 'the model'} ({model.family.full_name})"


def _on(network: N, deltas: Deltas, strength: Array, live: bool) -> N:
    """The network with deltas on its layers; the same one if nothing is to be changed."""
    if not deltas or not (live or isinstance(strength, Tracer) or float(strength) != 0):
        return network
    add = adapted if live else merged
    return replaced(network, {path: add(find(network, path), delta, strength) for path, delta in deltas.items()})


def _strength(value: Any) -> Array:
    """A float32 scalar. Raises SfumatoError for what is no finite number."""
    return jnp.asarray(value, jnp.float32) if isinstance(value, Tracer) else number("A LoRA's strength", value)


def _check(component: str, network: nnx.Module | None, deltas: Deltas, name: str) -> None:
    """Raises MismatchError, with the nearest layer or both shapes, if a delta has no place in the network."""
    if network is None:
        raise MismatchError(f"This LoRA changes {component}, which {name} does not have.")
    lost = [path for path in deltas if _parameter(network, path) is None]
    if lost:
        paths = [key.removesuffix(".weight") for key in slots(network) if key.endswith(".weight")]
        near = difflib.get_close_matches(lost[0], paths, n=1, cutoff=0.6)
        raise MismatchError(
            f"{len(lost)} of the {len(deltas)} layers of {component} that this LoRA changes are not in {name}: "
            f"{lost[0]}{f' (nearest: {near[0]})' if near else ''}."
        )
    apart = {path: why for path, delta in deltas.items() if (why := _misfit(network, path, delta))}
    if apart:
        path, why = next(iter(apart.items()))
        raise MismatchError(
            f"{len(apart)} of the {len(deltas)} layers of {component} in this LoRA do not fit {name}; in {path} {why}."
        )


def _layer(network: nnx.Module, path: str) -> Any:
    layer = find(network, path)
    return layer.layer if isinstance(layer, Adapted) else layer


def _parameter(network: nnx.Module, path: str) -> Any:
    """The parameter that a delta at this path changes."""
    layer = _layer(network, path)
    return getattr(layer, leaf_of(layer) or "", None)


def _misfit(network: nnx.Module, path: str, delta: Delta) -> str | None:
    why = delta.misfit(_parameter(network, path).shape)
    bias = getattr(_layer(network, path), "bias", None)
    if why or delta.bias is None:
        return why
    if bias is None or bias.shape != delta.bias.shape:
        return (
            f"it changes a bias of {delta.bias.shape[0]} and the layer has {'none' if bias is None else len(bias[...])}"
        )
    return None
