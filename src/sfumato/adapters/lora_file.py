"""`load_lora`: a file or folder of any known format becomes a `Lora`."""

from __future__ import annotations

import dataclasses as dc
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from sfumato.adapters import lora_names as names
from sfumato.adapters import lora_parts as parts
from sfumato.adapters.delta import Delta
from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_names import Layers
from sfumato.adapters.lora_open import Config, open_lora, scaling, settings
from sfumato.adapters.report import Matched, Report, Unmatched
from sfumato.adapters.textual_inversion import Embedding, read_embeddings
from sfumato.errors import FileError, MismatchError
from sfumato.io.broken import plain
from sfumato.io.family import Family
from sfumato.io.lazy import LazyTensor, TensorFile
from sfumato.io.recognise import recognise
from sfumato.io.recognise_lora import LoraFinding, recognise_lora
from sfumato.model import Model, family_of_config
from sfumato.models.controlnet import ControlNet

Components = Mapping[str, Layers]
Deltas = dict[str, dict[str, Delta]]
UNETS = ("unet", "controlnet")
XL = {Family.SDXL, Family.SDXL_REFINER}
"""Without cross-attention, the layers of these two look alike."""
MOST_HINTS = 30
"""Unmatched layers for which the nearest one is looked up, which takes a moment."""


def load_lora(file: str | Path, model: Model | ControlNet | None = None, *, partial: bool = False) -> Lora:
    """A LoRA or one of its relatives, from a .safetensors file, a .bin or .pt file, a folder, or the hub.

    The names in the file are looked up in `model`, or without one in the published networks of the family that the
    file is made for. Nothing in a file is run. `lora.report` says what was found and what was scaled by which alpha.

    Raises FileError for a file that is damaged or holds something else, and MismatchError if it is for another family
    or any of it finds no place in the model; `partial` leaves out what does not fit instead.
    """
    opened, configs = open_lora(file)
    finding = recognise_lora(opened)
    if finding is None:
        raise FileError(f"{opened.path} holds no LoRA but {_what(opened)}.")
    report, deltas = _match(opened, finding, configs, model)
    _check(report, finding, model, partial)
    layers = {component: {path: _read(delta, f"{component}.{path}", opened.path) for path, delta in held.items()}
              for component, held in deltas.items()}  # fmt: skip
    return Lora(layers, _embeddings(opened) if finding.tokens else {}, report)


def examine(file: TensorFile, finding: LoraFinding) -> Report:
    """The report of a file, without reading its matrices: on the published networks, or on the embedded model if it is
    none of theirs."""
    from sfumato.embedded import DEFAULT
    from sfumato.io.load import load

    configs = settings(file)
    report, _ = _match(file, finding, configs, None)
    if report.matched:
        return report
    own, _ = _match(file, finding, configs, load(DEFAULT))
    return report if own.unmatched else own


def _match(
    file: TensorFile, finding: LoraFinding, configs: Mapping[str, Config], model: Model | ControlNet | None
) -> tuple[Report, Deltas]:
    """The report and the changes, on the model, or else on the published family that fits best."""
    if model is not None:
        family = model.family if isinstance(model, Model) else family_of_config(model.config)
        name = f"{model.name or 'the model'}" if isinstance(model, Model) else "the ControlNet"
        target = f"{name} ({family.full_name})"
        return _match_layers(file, finding, configs, names.layers_of_model(model), target, family)
    families = [finding.family] if finding.family else list(Family)
    found = [
        _match_layers(file, finding, configs, names.layers_of_family(family), family.full_name, family)
        for family in families
    ]
    fewest = min(len(report.unmatched) for report, _ in found)
    best = [(report, deltas) for report, deltas in found if len(report.unmatched) == fewest]
    report, deltas = best[0]
    if len(best) > 1:
        report = dc.replace(report, family=None, target=" and ".join(each.target for each, _ in best))
    return report, deltas


def _match_layers(
    file: TensorFile, finding: LoraFinding, configs: Mapping[str, Config], components: Components, target: str,
    family: Family,
) -> tuple[Report, Deltas]:  # fmt: skip
    """Looks every layer of a file up."""
    find = _finder(file, finding, components)
    matched: list[Matched] = []
    unmatched = [Unmatched(key, "it belongs to no layer") for key in finding.rest]
    deltas: Deltas = {}
    beyond = 0
    for name, tensors in finding.modules.items():
        place = find(name)
        if place is None and names.is_beyond(name, components):
            beyond += 1
            continue
        made = "there is no such layer" if place is None else _delta(name, tensors, configs, components, *place)
        if place is not None and place[1] in deltas.get(place[0], {}):
            made = f"the file changes {'.'.join(place)} twice"
        if isinstance(made, str) or place is None:
            hint = names.nearest(name, components) if place is None and len(unmatched) < MOST_HINTS else None
            unmatched.append(Unmatched(name, str(made), hint))
            continue
        component, path = place
        delta, alpha = made
        deltas.setdefault(component, {})[path] = delta
        matched.append(Matched(name, component, path, delta.rank, alpha, float(getattr(delta, "scale", 1.0))))
    fits = None if unmatched else family
    report = Report(
        file.path, finding.details["format"], finding.family or fits, finding.details["variant"], tuple(matched),
        tuple(unmatched), beyond, finding.tokens, target,
    )  # fmt: skip
    return report, deltas


def _finder(
    file: TensorFile, finding: LoraFinding, components: Components
) -> Callable[[str], tuple[str, str] | None]:  # fmt: skip
    """From a layer's name in a file to its component and path."""
    if finding.details["format"] != "cloneofsimo":
        return lambda name: names.find(name, components)
    shapes: dict[str, dict[int, tuple[int, int]]] = {component: {} for component in components}
    for name, tensors in finding.modules.items():
        component, _, number = name.partition(":")
        ends = [tensors[part].shape for part in ("up", "down") if part in tensors and len(tensors[part].shape) > 1]
        if component in shapes and len(ends) == 2:
            shapes[component][int(number)] = (ends[0][0], ends[1][1])
    table: dict[str, tuple[str, str]] = {}
    for component, layers in components.items():
        order = names.numbered(shapes[component], layers, _targets(file, component))
        table |= {f"{component}:{i}": (component, path) for i, path in order.items()}
    return table.get


def _targets(file: TensorFile, component: str) -> list[str]:
    """The classes of modules that a file of cloneofsimo's says it changes."""
    try:
        found = json.loads(file.metadata.get(component, ""))
    except (ValueError, RecursionError):
        found = None
    known = [name for name in found if name in names.TARGETS] if isinstance(found, list) else []
    return known or list(names.DEFAULT_TARGETS.get(component, ()))


def _delta(
    name: str, tensors: Mapping[str, LazyTensor], configs: Mapping[str, Config], components: Components,
    component: str, path: str,
) -> tuple[Delta, float | None] | str:  # fmt: skip
    """The change of a layer and its alpha; a string says why it does not fit."""
    held = parts.roles(tensors)
    if isinstance(held, str):
        return held
    config = configs.get(component) or configs.get("", {})
    alpha, scale = scaling(config, names.bare(name), parts.alpha(held), parts.rank(held))
    delta = parts.delta(held, scale)
    if isinstance(delta, str):
        return delta
    layers = components[component]
    why = delta.misfit(layers.shapes[path])
    if why is None and delta.bias is not None and layers.biases.get(path) != delta.bias.shape[0]:
        why = f"it changes a bias of {delta.bias.shape[0]} and the layer has {layers.biases.get(path, 'none')}"
    return why or (delta, alpha)


def _check(report: Report, finding: LoraFinding, model: Model | ControlNet | None, partial: bool) -> None:
    """Raises FileError or MismatchError if there is anything that does not fit, or with `partial` nothing that does."""
    family = model.family if isinstance(model, Model) else family_of_config(model.config) if model else None
    apart = family is not None and report.family is not None and family is not report.family
    # Shapes can fit nevertheless: families share text encoders, and SD 1.x and 2.x differ by little but the context.
    wrong = apart and {family, report.family} != XL and any(layer.component in UNETS for layer in report.matched)
    if report.matched and (partial or not (report.unmatched or wrong)):
        return
    if finding.problem:
        raise FileError(f"{report.path} cannot be used: {finding.problem}.")
    hint = "; partial=True loads the layers that fit" if report.matched else ""
    if apart and report.family:
        kind = report.family.full_name
        raise MismatchError(f"{report.path} is a LoRA for {kind} and not made for {report.target}{hint}.")
    nothing = f"all of its {report.beyond} layers are of parts that a ControlNet does not have"
    raise MismatchError(f"{report.path} does not fit: {report.problem() or nothing}{hint}.")


def _read(delta: Delta, name: str, path: Path) -> Delta:
    """The change with its numbers in memory. Raises FileError for numbers that are not finite."""
    return jax.tree.map(lambda array: _numbers(array, f"its change of {name}", path), delta)


def _embeddings(file: TensorFile) -> dict[str, Embedding]:
    """The new tokens that a file carries. Raises FileError for vectors of other shapes, or that are not finite."""
    return {
        token: Embedding(token, {encoder: _numbers(np.atleast_2d(tensor.read()), f"the token {plain(token)}", file.path)
                                 for encoder, tensor in vectors.items()})
        for token, vectors in read_embeddings(file).items()
    }  # fmt: skip


def _numbers(array: np.ndarray, what: str, path: Path) -> jax.Array:
    """A copy that does not need the file. Raises FileError for numbers that are not finite."""
    array = np.array(array, np.float32 if array.dtype == np.float64 else array.dtype)
    if not np.isfinite(array.astype(np.float32) if array.dtype.kind == "V" else array).all():
        raise FileError(f"{path} holds numbers that are not finite in {what}, so it is damaged.")
    return jax.device_put(array)


def _what(file: TensorFile) -> str:
    """What a file that is no LoRA holds."""
    finding = recognise(file)
    if finding.kind == "unknown":
        first = next(iter(file.tensors), None)
        return finding.details.get("is") or (f"tensors such as {plain(first)}" if first else "nothing at all")
    return f"a {finding.kind}" + (f" of {finding.family.full_name}" if finding.family else "")
