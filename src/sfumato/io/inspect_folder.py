"""What a folder is: a diffusers model, one component of it, or a folder around a file of weights."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection
from pathlib import Path
from typing import TypeAlias

from sfumato.errors import FileError
from sfumato.io.broken import plain
from sfumato.io.family import FAMILY_OF_TEXT, Family, family_of_context, purpose_of
from sfumato.io.folder import ENDINGS, STEMS, choose_weights, read_json, variant_of
from sfumato.io.recognise import STRANGE, Finding, recognise
from sfumato.io.tensors import TensorFile, open_tensors

KINDS = {
    "UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "AutoencoderKL": "vae",
    "AutoencoderTiny": "tiny autoencoder", "CLIPTextModel": "text encoder",
    "CLIPTextModelWithProjection": "text encoder",
}  # fmt: skip
"""What we call a component, by its class in diffusers or transformers."""

WEIGHTLESS = re.compile(r"(Scheduler|Tokenizer\w*|FeatureExtractor|Processor\w*|Config)$")
OPTIONAL = {"safety_checker", "feature_extractor", "image_encoder"}
"""Components that a model runs without."""

SUFFIXES = {".safetensors", ".ckpt", ".pt", ".pth", ".bin"}


Described: TypeAlias = tuple[Finding, list[TensorFile]]
"""What was found in a folder, and the files of weights that were looked at for it."""


def read_folder(path: Path) -> Described:
    """Describes a folder. Raises FileError if its main file (JSON or weights) is damaged."""
    if (path / "model_index.json").exists():
        return _model(path)
    if (path / "config.json").exists():
        return _component(path)
    return _around(path)


def _model(path: Path) -> Described:
    index = read_json(path / "model_index.json")
    components = {
        name: value[1] for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(isinstance(word, str) for word in value)
    }  # fmt: skip
    details = {"pipeline": plain(str(index.get("_class_name", "unknown")))}
    problems: list[str] = []
    files: list[TensorFile] = []
    families: list[Family | None] = []
    for name, kind in components.items():
        details[name] = plain(kind)
        folder = path / Path(name).name
        if not folder.is_dir():
            if name not in OPTIONAL:
                problems.append(f"model_index.json lists {plain(name)} ({plain(kind)}), but there is no such folder")
        elif not WEIGHTLESS.search(kind):
            try:
                finding, held = _component(folder)
            except FileError as error:
                problems.append(str(error).rstrip("."))
                continue
            files += held
            details[name] = ", ".join([plain(kind), *finding.details.values()])
            families += [finding.family] if finding.kind == "unet" else []
            if finding.problem and name not in OPTIONAL:
                problems.append(f"{name}: {finding.problem}")
    if not components:
        problems.append("model_index.json lists no components")
    family = families[0] if families else None
    return Finding("diffusers folder", family, details, "; ".join(problems) or None), files


def _component(path: Path) -> Described:
    """A folder with a config.json and weights."""
    config = read_json(path / "config.json")
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else "unknown"
    name = str(config.get("_class_name") or first)
    kind = KINDS.get(name, "unknown")
    details = {} if kind != "unknown" else {"class": plain(name)}
    family = family_of_context(config.get("cross_attention_dim"))
    if kind == "unet":
        purpose = purpose_of(config.get("in_channels"), config.get("out_channels", 4))
        details["purpose"] = purpose or "unknown"
    if kind == "text encoder":
        width = config.get("hidden_size")
        family = FAMILY_OF_TEXT.get(width) if isinstance(width, int) else None
    names = sorted(entry.name for entry in path.iterdir())
    found = variants(names)
    if not found:
        return Finding(kind, family, details, _no_weights(names)), []
    if found != [""]:
        details["variants"] = ", ".join(variant or "plain" for variant in found)
    file = open_tensors(path / choose_weights(names, variant=found[0] or None, where=str(path)))
    held = recognise(file)
    problem = held.problem
    if problem == STRANGE and kind == held.kind and isinstance(config.get("cross_attention_dim"), int):
        # A lone file of another width tells too little to be built; with its configuration it is a model of its own.
        problem, details["text features"] = None, f"text features of width {config['cross_attention_dim']}"
    if held.family and family and held.family is not family:
        problem = f"config.json describes {family.full_name}, but the weights are of {held.family.full_name}"
    elif kind != "unknown" and held.kind != kind:
        problem = f"config.json describes a {kind}, but the weights are of the kind {held.kind}"
    return Finding(kind, family, details, problem), [file]


def _around(path: Path) -> Described:
    """A folder without settings: that of one file of weights, or unknown."""
    names = sorted(entry.name for entry in path.iterdir())
    known = [name for name in names if Path(name).suffix in SUFFIXES]
    found = variants(names)
    if found or len({Path(name).stem for name in known}) == 1:
        # The same weights in two containers: the safe one.
        name = choose_weights(names, variant=found[0] or None, where=str(path)) if found else max(known, key=_is_safe)
        file = open_tensors(path / name)
        finding = recognise(file)
        return dc.replace(finding, details={"file": name} | finding.details), [file]
    some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    problem = "it has neither model_index.json nor config.json" + (
        f", and {len(known)} files of weights: name one of them" if known else " nor a file of weights")  # fmt: skip
    return Finding("unknown", details={"contents": some or "nothing"}, problem=problem), []


def _is_safe(name: str) -> bool:
    return name.endswith(".safetensors")


def variants(names: Collection[str]) -> list[str]:
    """The variants of a component's weights, "" being the plain one."""
    found = {variant_of(name, stem, ending) for name in names for stem in STEMS for ending in ENDINGS}
    return sorted(variant for variant in found if variant is not None)


def _no_weights(names: Collection[str]) -> str:
    parts = [name for name in names if re.search(r"-\d{5}-of-\d{5}\.", name)]
    if parts:
        return f"it has parts such as {parts[0]}, but not the index that belongs to them"
    others = [name for name in names if Path(name).suffix in {".msgpack", ".onnx", ".h5", ".xml"}]
    return "it has a config.json, but no weights" + (f" that sfumato reads ({others[0]})" if others else "")
