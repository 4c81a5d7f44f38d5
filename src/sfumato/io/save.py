"""`save`: a model or a ControlNet as a folder in the diffusers layout, which diffusers loads back."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from sfumato.adapters.live import is_live
from sfumato.errors import SfumatoError
from sfumato.io.family import Family, Purpose, purpose_of
from sfumato.io.fill import Slot, slots
from sfumato.io.load import tokenizer_name
from sfumato.model import Model
from sfumato.models.config import to_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.held import held

FORMAT_VERSION = "0.42.1"
"""The version of diffusers whose format is written."""

PIPELINES: Mapping[tuple[Family | None, Purpose], str] = {
    (None, Purpose.TEXT): "StableDiffusionPipeline",
    (None, Purpose.DEPTH): "StableDiffusionDepth2ImgPipeline",
    (None, Purpose.EDIT): "StableDiffusionInstructPix2PixPipeline",
    (None, Purpose.INPAINT): "StableDiffusionInpaintPipeline",
    (Family.SDXL, Purpose.TEXT): "StableDiffusionXLPipeline",
    (Family.SDXL, Purpose.EDIT): "StableDiffusionXLInstructPix2PixPipeline",
    (Family.SDXL, Purpose.INPAINT): "StableDiffusionXLInpaintPipeline",
    (Family.SDXL_REFINER, Purpose.TEXT): "StableDiffusionXLImg2ImgPipeline",
}
"""diffusers' pipeline for a family and a purpose; None stands for all other families."""

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "StableDiffusionXLPipeline": ("image_encoder", "feature_extractor"),
    "StableDiffusionDepth2ImgPipeline": ("depth_estimator", "feature_extractor"),
    "StableDiffusionPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInpaintPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionInstructPix2PixPipeline": ("safety_checker", "feature_extractor", "image_encoder"),
    "StableDiffusionXLInpaintPipeline": ("image_encoder", "feature_extractor"),
}
"""Components that a pipeline has and sfumato does not: written as absent."""

DTYPE_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def save(model: Model | ControlNet, folder: str | Path, *, overwrite: bool = False) -> Path:
    """Writes `model` to `folder` in the diffusers layout, and returns the folder.

    The folder appears only when it is complete. Raises SfumatoError if it is there already, unless `overwrite`,
    and for a model that LoRAs are live on or whose kernels are int8 or prepared.
    """
    folder = Path(folder)
    networks = [model] if isinstance(model, ControlNet) else [model.unet, *model.text_encoders.values()]
    if any(map(is_live, networks)):
        raise SfumatoError("A LoRA is live on this model, beside its weights; apply it without live=True to save both.")
    kind = next(filter(None, map(held, networks)), None)
    if kind is not None:
        raise SfumatoError(
            f"The kernels of this model are {kind.form}, which the format has no place for; save it as it was."
        )
    if folder.exists() and not overwrite and (not folder.is_dir() or any(folder.iterdir())):
        raise SfumatoError(f"{folder} is there already; name another folder or say overwrite=True.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        if isinstance(model, ControlNet):
            _network(model, temporary, "ControlNetModel")
        else:
            _pipeline(model, temporary)
        temporary.chmod(0o777 & ~_umask())
        put_in_place(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _pipeline(model: Model, folder: Path) -> None:
    purpose = purpose_of(model.unet.config.in_channels, model.vae.config.latent_channels) or Purpose.TEXT
    family = Family(model.family)
    kind = PIPELINES.get((family, purpose)) or PIPELINES[None, purpose]
    index: dict[str, Any] = {"_class_name": kind, "_diffusers_version": FORMAT_VERSION, **model.options}
    index |= {name: [None, None] for name in EXTRAS.get(kind, ())}
    index["unet"] = _network(model.unet, folder / "unet", "UNet2DConditionModel")
    index["vae"] = _network(model.vae, folder / "vae", "AutoencoderKL")
    index["scheduler"] = ["diffusers", model.schedule.class_name]
    for name in ("text_encoder", "text_encoder_2"):
        if name not in model.text_encoders:
            if family in (Family.SDXL, Family.SDXL_REFINER):
                index |= {name: [None, None], tokenizer_name(name): [None, None]}
            continue
        encoder = model.text_encoders[name]
        kind = (encoder.config.architectures or ("CLIPTextModel",))[0]
        index[name] = _network(encoder, folder / name, kind, library="transformers")
        index[tokenizer_name(name)] = ["transformers", "CLIPTokenizer"]
        model.tokenizers[tokenizer_name(name)].save(folder / tokenizer_name(name))
    (folder / "scheduler").mkdir()
    schedule = model.schedule.to_config() | {"_diffusers_version": FORMAT_VERSION}
    write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    write_json(folder / "model_index.json", index)


def _network(network: nnx.Module, folder: Path, kind: str, library: str = "diffusers") -> list[str]:
    """Writes one component and returns its entry in the index."""
    folder.mkdir(exist_ok=True)
    config = to_dict(network.config)  # type: ignore[attr-defined]
    if library == "transformers":
        config |= {"model_type": "clip_text_model", "architectures": [kind]}
        stem = "model"
    else:
        config = {"_class_name": kind, "_diffusers_version": FORMAT_VERSION} | config
        stem = "diffusion_pytorch_model"
    write_json(folder / "config.json", config)
    write_safetensors(network, folder / f"{stem}.safetensors")
    return [library, kind]


def write_safetensors(network: nnx.Module, path: Path) -> None:
    """Writes the parameters of `network` by their checkpoint keys, one after another so that none is held twice.

    The safetensors library would hold all of them as bytes at once. The format is a length (8 bytes, little-endian),
    a JSON header and the numbers: https://github.com/huggingface/safetensors.
    """
    values = {path: leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(network, nnx.Param))}
    entries, end = {}, 0
    ordered = sorted(slots(network).values(), key=lambda slot: slot.key)
    for slot in ordered:
        value = values[slot.path]
        start, end = end, end + value.nbytes
        entries[slot.key] = {
            "dtype": DTYPE_NAMES[str(value.dtype)], "shape": list(slot.stored), "data_offsets": [start, end],
        }  # fmt: skip
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for slot in ordered:
            file.write(stored(np.asarray(values[slot.path]), slot).data)
        file.flush()
        os.fsync(file.fileno())


def stored(value: np.ndarray, slot: Slot) -> np.ndarray:
    """A parameter as a checkpoint has it: outputs first; as plain bytes in one piece."""
    if slot.is_kernel:
        value = np.moveaxis(value, (-1, -2), (0, 1))
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON file as the format has it."""
    path.write_text(json.dumps(value, indent=2, default=_plain) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if dc.is_dataclass(value) and not isinstance(value, type):
        return dc.asdict(value)
    raise SfumatoError(f"A setting of the model cannot be written as JSON: {value!r}.")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def put_in_place(temporary: Path, folder: Path) -> None:
    """Puts the finished folder in place; the old one goes only after that."""
    if not folder.exists():
        temporary.rename(folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    folder.rename(old / folder.name)
    temporary.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
