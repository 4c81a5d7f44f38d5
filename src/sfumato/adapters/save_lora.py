"""`save_lora`: a LoRA as a .safetensors file that kohya's scripts, diffusers and the user interfaces read."""

from __future__ import annotations

import dataclasses as dc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sfumato.adapters.delta import Delta, Full, LoHa, LoKr, LowRank
from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_names import original_names
from sfumato.adapters.published import UNETS
from sfumato.errors import SfumatoError
from sfumato.image import write_atomically
from sfumato.io.family import Family
from sfumato.io.original_names import rename

Tensors = dict[str, np.ndarray]

FOLDER_NAME = "pytorch_lora_weights.safetensors"
"""What diffusers looks for in a folder."""

KOHYA = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2", "controlnet": "lora_controlnet"}
KOHYA_XL = KOHYA | {"text_encoder": "lora_te1"}
BASE = {Family.SD1: "sd_v1", Family.SD2: "sd_v2", Family.SDXL: "sdxl_base_v1-0", Family.SDXL_REFINER: "sdxl_refiner"}
"""The family in kohya's metadata."""


def save_lora(lora: Lora, file: str | Path, format: str = "kohya", *, overwrite: bool = False) -> Path:
    """Writes the layers of a LoRA and returns the file.

    `file` ends in .safetensors or is a folder that is there, in which the file gets the name that diffusers looks for.
    `format` is "kohya", which holds everything, with SDXL in the original numbering as kohya's scripts write it, or
    "diffusers", which holds LoRA, LoCon and DoRA. Embedded tokens are not written. diffusers mixes different alphas of
    one network up, so they are made one, or 1 x, by scaling matrices; a LoRA whose alphas are equal keeps its numbers.

    Raises SfumatoError if the file is there already, unless `overwrite`, or for what a format cannot hold.
    """
    file = Path(file)
    file = file / FOLDER_NAME if file.is_dir() else file
    if file.suffix != ".safetensors":
        raise SfumatoError(f"LoRA files are written as .safetensors, and {file} is neither that nor a folder.")
    if format not in FORMATS:
        raise SfumatoError(f"Unknown format {format!r} for a LoRA; there are {' and '.join(FORMATS)}.")
    if file.exists() and not overwrite:
        raise SfumatoError(f"{file} is there already; name another file or say overwrite=True.")
    if not any(lora.layers.values()):
        raise SfumatoError("This LoRA has no layers, so there is nothing to write.")
    tensors = FORMATS[format](lora)
    family = family_of(lora)
    metadata = {"format": "pt"}
    if format == "kohya" and family:
        metadata |= {"ss_network_module": "networks.lora", "ss_base_model_version": BASE[family]}
    write_tensors(tensors, file, metadata)
    return file


def family_of(lora: Lora) -> Family | None:
    """The family that a LoRA is for, as far as it tells."""
    if lora.report is not None:
        return lora.report.family
    deep = any(".transformer_blocks.1." in path for path in lora.layers.get("unet", {}))
    return Family.SDXL if deep or "text_encoder_2" in lora.layers else None


def _kohya(lora: Lora) -> Tensors:
    family = family_of(lora)
    xl = family in (Family.SDXL, Family.SDXL_REFINER)
    original = original_names(UNETS[family]) if xl and family else {}
    tensors: Tensors = {}
    for component, deltas in lora.layers.items():
        alphas = _alphas(deltas)
        for path, delta in deltas.items():
            name = (rename(path, original) or path) if component == "unet" else path
            stem = f"{(KOHYA_XL if xl else KOHYA)[component]}_{name.replace('.', '_')}"
            tensors |= {f"{stem}.{role}": array for role, array in _parts(delta, alphas.get(path)).items()}
    return tensors


def _alphas(deltas: Mapping[str, Delta]) -> dict[str, float]:
    """The alpha to write for each layer of a network; layers without any are 1 x."""
    alphas = {path: _alpha(delta) for path, delta in deltas.items() if delta.rank is not None}
    if len(set(alphas.values())) < 2 or not all(isinstance(delta, LowRank) for delta in deltas.values()):
        return alphas  # files with relatives of LoRA are not for diffusers, and everybody else reads each layer's own
    if all(alphas[path] == delta.rank for path, delta in deltas.items() if path in alphas):
        return {}
    return dict.fromkeys(alphas, Counter(alphas.values()).most_common(1)[0][0])


def _alpha(delta: Delta) -> float:
    return float(np.float32(delta.scale) * np.float32(delta.rank))  # type: ignore[attr-defined]


def _parts(delta: Delta, alpha: float | None) -> Tensors:
    """The tensors of a layer by kohya's and LyCORIS' names."""
    parts: Tensors = {}
    if isinstance(delta, LowRank):
        written = (delta.rank if alpha is None else alpha) / delta.rank
        parts["lora_down.weight"] = np.asarray(delta.down)
        parts["lora_up.weight"] = scaled(delta.up, float(delta.scale) / written if written else 1.0)
        parts |= {} if delta.mid is None else {"lora_mid.weight": np.asarray(delta.mid)}
    elif isinstance(delta, LoHa | LoKr):
        prefix = "hada" if isinstance(delta, LoHa) else "lokr"
        fields = {field.name: getattr(delta, field.name) for field in dc.fields(delta)}
        parts = {f"{prefix}_{name}": np.asarray(value) for name, value in fields.items()
                 if name not in ("scale", "magnitude") and value is not None}  # fmt: skip
        if alpha is None and f"{prefix}_w1" in parts:
            parts[f"{prefix}_w1"] = scaled(parts[f"{prefix}_w1"], float(delta.scale))
    elif isinstance(delta, Full):
        parts = {name: np.asarray(value) for name, value in (("diff", delta.diff), ("diff_b", delta.bias))
                 if value is not None}  # fmt: skip
    if alpha is not None:
        parts["alpha"] = np.asarray(alpha, np.float32)
    if delta.magnitude is not None:
        magnitude = np.asarray(delta.magnitude)
        axes = len(delta.shape) - 1
        parts["dora_scale"] = magnitude.reshape(-1, *[1] * axes) if magnitude.ndim == 1 else magnitude
    return parts


def _diffusers(lora: Lora) -> Tensors:
    tensors: Tensors = {}
    for component, deltas in lora.layers.items():
        text = component.startswith("text_encoder")
        down, up = ("lora_linear_layer.down", "lora_linear_layer.up") if text else ("lora_A", "lora_B")
        for path, delta in deltas.items():
            if not isinstance(delta, LowRank):
                raise SfumatoError(f"The diffusers format has no {type(delta).__name__} ({component}.{path}); "
                                   "write this LoRA in the format kohya.")  # fmt: skip
            stem = f"{component}.{path}"
            tensors[f"{stem}.{down}.weight"] = _whole_down(delta)
            tensors[f"{stem}.{up}.weight"] = scaled(delta.up, float(delta.scale))
            if delta.magnitude is not None:
                # transformers and diffusers, who load them, want different names
                tensors[f"{stem}.lora_magnitude_vector{'.weight' if text else ''}"] = _by_output(delta, stem)
    return tensors


def _whole_down(delta: LowRank) -> np.ndarray:
    """The matrix that reduces, with the core of the Tucker form in it, at the same rank."""
    down = np.asarray(delta.down)
    if delta.mid is None:
        return down
    mid = np.asarray(delta.mid, np.float32)
    flat = down.reshape(down.shape[:2]).astype(np.float32)
    return np.einsum("rskl,si->rikl", mid, flat)


def _by_output(delta: LowRank, name: str) -> np.ndarray:
    """DoRA's magnitudes as PEFT has them: [O], for a convolution [1, O, 1, 1]."""
    magnitude, shape = np.asarray(delta.magnitude), delta.shape
    if magnitude.size != shape[0] or (magnitude.ndim > 1 and magnitude.shape[0] != shape[0]):
        raise SfumatoError(f"The diffusers format has no DoRA by inputs ({name}); write this LoRA in the format kohya.")
    return magnitude.reshape(-1) if len(shape) == 2 else magnitude.reshape(1, -1, *[1] * (len(shape) - 2))


def scaled(array: Any, factor: float) -> np.ndarray:
    """`array` times `factor`, in its own type if that is exact, else float32."""
    array = np.asarray(array)
    if factor == 1:
        return array
    product = array.astype(np.float32) * np.float32(factor)
    narrow = product.astype(array.dtype)
    return narrow if np.array_equal(narrow.astype(np.float32), product) else product


def write_tensors(tensors: Tensors, file: Path, metadata: dict[str, str]) -> None:
    """A .safetensors file, which is there only once it is whole."""
    from safetensors.numpy import save

    whole = {key: np.ascontiguousarray(array) for key, array in tensors.items()}
    write_atomically(file, lambda out: out.write(save(whole, metadata)))


FORMATS = {"kohya": _kohya, "diffusers": _diffusers}
"""What makes the tensors of a file, by format."""
