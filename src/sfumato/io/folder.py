"""Folders in the diffusers layout: a sub-folder a component, each with its JSON and its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from sfumato.errors import FileError
from sfumato.io.lazy import LazyTensor
from sfumato.io.original import own_text_name, own_vae_name
from sfumato.io.single_file import Parts, family_of
from sfumato.io.tensors import open_tensors

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
"""Components with weights that sfumato uses; others (a safety checker, a feature extractor) are left alone."""

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
"""Names of weight files, best first, before the variant and the ending."""

ENDINGS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Endings of weight files, best first."""


def read_folder(folder: Path, *, variant: str | None = None, weights: bool = True) -> Parts:
    """Describes a diffusers folder: configurations, and tensors that are read later; without `weights` there are none.

    Raises FileError for what is missing or damaged, or a folder of another kind of model.
    """
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name", "a pipeline without a name")
    if index.get("unet") in (None, [None, None]):
        raise FileError(f"{folder} holds {kind}, which has no UNet; sfumato knows SD 1.x, 2.x and SDXL.")
    present = [name for name in NETWORKS if index.get(name) not in (None, [None, None])]
    lost = [name for name in (*present, "scheduler") if not (folder / name).is_dir()]
    if lost:
        raise FileError(f"{folder} is not whole: model_index.json names {', '.join(lost)}, which is not there.")
    configs = {name: read_json(folder / name / "config.json") for name in present}
    configs["scheduler"] = read_json(folder / "scheduler" / "scheduler_config.json")
    configs["index"] = {k: v for k, v in index.items() if not isinstance(v, list) and not k.startswith("_")}
    tensors = {name: read_component(folder / name, name, variant=variant) if weights else {} for name in present}
    return Parts(family_of(configs), configs, tensors)


def read_component(folder: Path, part: str, *, variant: str | None = None) -> dict[str, LazyTensor]:
    """The tensors of one component, under the names that its network has here."""
    name = choose_weights([p.name for p in folder.iterdir() if p.is_file()], variant=variant, where=str(folder))
    rename = own_text_name if part.startswith("text_encoder") else own_vae_name if part == "vae" else str
    return {rename(key): tensor for key, tensor in open_tensors(folder / name).tensors.items()}


def choose_weights(names: Collection[str], *, variant: str | None, where: str) -> str:
    """Which of a folder's files to read: of the wanted variant, safetensors before pickles, whole before sharded.

    Without a wish it is the plain file, or the only variant that there is. Raises FileError with what there is.
    """
    found: dict[str | None, list[str]] = {}
    for stem in STEMS:
        for ending in ENDINGS:
            for name in sorted(names):
                kind = variant_of(name, stem, ending)
                if kind is not None:
                    found.setdefault(kind or None, []).append(name)
    if variant is None and None not in found and len(found) == 1:
        (variant,) = found
    if variant in found:
        return min(found[variant], key=lambda name: (".bin" in name, name.endswith(".json")))
    if not found:
        raise FileError(f"{where} has no weights: none of {', '.join(stem + ENDINGS[0] for stem in STEMS)} is there.")
    wanted = "plain weights" if variant is None else f"variant {variant!r}"
    there = ", ".join("plain weights" if kind is None else repr(kind) for kind in found)
    raise FileError(f"{where} has no {wanted}; there is {there}.")


def variant_of(name: str, stem: str, ending: str) -> str | None:
    """The variant in a file name, "" for none; None for another kind of file."""
    dot = r"(?:\.(?P<{}>[A-Za-z0-9_]+))?"
    base, _, index = ending.partition(".index.json") if ending.endswith(".index.json") else (ending, "", None)
    pattern = re.escape(stem) + dot.format("a") + re.escape(base)
    if index is not None:
        pattern += r"\.index" + dot.format("b") + r"\.json"
    match = re.fullmatch(pattern, name)
    if match is None:
        return None
    return next((value for value in match.groupdict().values() if value), "")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; FileError if it is not there or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} is missing.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is damaged ({type(error).__name__}); download it again.") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} is damaged: it holds no JSON object.")
    return value
