"""Finding the tensors of a LoRA: in a file, a folder, folders for each component, or on the hub; and PEFT's settings,
which stand beside them in `adapter_config.json` or within, in the metadata that diffusers writes."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import FileError
from sfumato.io.folder import read_json
from sfumato.io.hub import resolve
from sfumato.io.tensors import TensorFile, open_tensors

STEMS = ("pytorch_lora_weights", "adapter_model")
"""The names that diffusers and PEFT give to files of adapters."""
ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
SETTINGS = "adapter_config.json"
INSIDE = "lora_adapter_metadata"
COMPONENTS = ("unet", "text_encoder", "text_encoder_2", "controlnet")

Config = Mapping[str, Any]


def open_lora(source: str | Path) -> tuple[TensorFile, dict[str, Config]]:
    """The tensors of a file, a folder or a hub repository, and PEFT's settings by component ("" for all of them).

    A folder may have a folder for each component, as PEFT saves the parts of a pipeline one by one. Raises FileError
    for what cannot be found or read.
    """
    path = resolve(source, lambda names, where: [_choose(names, where), SETTINGS])
    if not path.is_dir():
        file = open_tensors(path)
        return file, settings(file)
    inner = {name: path / name for name in COMPONENTS if (path / name / SETTINGS).is_file()}
    if not inner:
        file = open_tensors(path / _choose([entry.name for entry in path.iterdir()], str(path)))
        return file, settings(file)
    tensors, configs, metadata, containers = {}, {}, {}, set()
    for component, folder in inner.items():
        file = open_tensors(folder / _choose([entry.name for entry in folder.iterdir()], str(folder)))
        tensors |= {f"{component}.{re.sub(r'^base_model.model.', '', key)}": t for key, t in file.tensors.items()}
        configs[component] = next(iter(settings(file).values()), {})
        metadata |= file.metadata
        containers.add(file.container)
    return TensorFile(path, tensors, metadata, " and ".join(sorted(containers))), configs


def settings(file: TensorFile) -> dict[str, Config]:
    """PEFT's settings of a file, by component. Raises FileError if they are damaged."""
    beside = file.path.parent / SETTINGS
    if file.path.stem.startswith("adapter_model") and beside.is_file():
        return {"": read_json(beside)}
    if INSIDE not in file.metadata:
        return {}
    try:
        found = json.loads(file.metadata[INSIDE])
        items = list(found.items())
    except (ValueError, AttributeError, RecursionError):
        raise FileError(f"{file.path} has damaged metadata: {INSIDE} is not a JSON object.") from None
    configs: dict[str, Any] = {}
    for key, value in items:
        component, dot, name = key.partition(".")
        known = bool(dot) and component in COMPONENTS
        configs.setdefault(component if known else "", {})[name if known else key] = value
    return configs


def scaling(config: Config, name: str, alpha: float | None, rank: int | None) -> tuple[float | None, float]:
    """The alpha that counts and the factor on the matrices of the layer `name`: alpha / rank.

    An alpha in the file goes before one in PEFT's settings; without any it is the rank. PEFT's rank-stabilised
    adapters divide by the root of the rank (arXiv:2312.03732). Changes that are whole have no scale, but those of PEFT
    have the rank of the settings. Raises FileError for settings that are no numbers.
    """
    try:
        if alpha is None and config:
            alphas = config.get("alpha_pattern") or {}
            key = next((key for key in alphas if _means(key, name)), None)
            value = alphas[key] if key is not None else config.get("lora_alpha", config.get("alpha"))
            alpha = None if value is None else float(value)
            rank = int(config.get("r", 0)) or None if rank is None else rank
        if alpha is None or not rank:
            return alpha, 1.0
        return alpha, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    except (TypeError, ValueError, AttributeError):
        raise FileError(
            f"PEFT's settings beside the adapter are damaged: alpha or rank of {name} is no number."
        ) from None


def _means(pattern: str, name: str) -> bool:
    """Whether a key of PEFT's tables, a regular expression for the end of a name, means this layer."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", name) is not None
    except re.error:
        return False


def _choose(names: Collection[str], where: str) -> str:
    """The file of weights in a folder: by its usual name, or the only one there is, safetensors first."""
    for stem in STEMS:
        for ending in ENDINGS:
            if stem + ending in names:
                return stem + ending
    files = [name for name in sorted(names) if "/" not in name and name.endswith(ENDINGS)]
    if len({Path(name).stem for name in files}) == 1:
        return min(files, key=lambda name: ENDINGS.index(Path(name).suffix))
    if not files:
        raise FileError(f"{where} holds no LoRA: there is no file of weights in it.")
    some = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    raise FileError(f"{where} holds {len(files)} files of weights, so name one of them: {some}.")
