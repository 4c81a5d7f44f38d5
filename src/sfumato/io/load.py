"""`load`, `load_controlnet`, `blank`: from a name to a model in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from flax import nnx

from sfumato.errors import FileError
from sfumato.io.fill import dtype_of, fill
from sfumato.io.folder import read_component, read_folder, read_json
from sfumato.io.hub import component_weights, pipeline_weights, resolve
from sfumato.io.single_file import Parts, read_single_file
from sfumato.io.tensors import open_tensors
from sfumato.model import Model, family_of_model
from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL, VAEConfig
from sfumato.schedule import Schedule
from sfumato.text.tokenizer import Tokenizer, clip_tokenizer
from sfumato.text.tokenizer_files import load_tokenizer

M = TypeVar("M", bound=nnx.Module)

CLASSES: dict[str, tuple[Any, Any]] = {
    "unet": (UNet, UNetConfig),
    "vae": (AutoencoderKL, VAEConfig),
    "text_encoder": (ClipTextEncoder, ClipTextConfig),
    "text_encoder_2": (ClipTextEncoder, ClipTextConfig),
    "controlnet": (ControlNet, ControlNetConfig),
}
"""The network and the configuration of each component."""

BUFFERS = re.compile(r"text_model\.embeddings\.position_ids")
"""Constants that files carry although they are no weights."""


def load(
    source: str | Path, *, dtype: str | None = None, revision: str | None = None, variant: str | None = None,
    vae: str | Path | None = None, prediction_type: str | None = None, ema: bool = False,
) -> Model:  # fmt: skip
    """A model from a diffusers folder, a hub id, or a single-file checkpoint (.safetensors, .ckpt).

    `dtype` is "float32", "bfloat16" or "float16"; None means bfloat16 on an accelerator and float32 on CPU.
    `revision` and `variant` (such as "fp16") choose among a repository's files. `vae` names another autoencoder to
    use instead, or for a checkpoint without one. `prediction_type` ("epsilon", "v_prediction", "sample") overrides
    what the checkpoint says, and `ema` takes the averaged weights that a single file may hold beside the others.

    Raises FileError for what cannot be found or read and MismatchError for weights that do not fit, each with one
    sentence that names everything that is wrong.
    """
    dtype = dtype or default_dtype()
    dtype_of(dtype)
    path = resolve(source, pipeline_weights(variant), revision=revision)
    if path.is_dir():
        parts = read_folder(path, variant=variant)
        if prediction_type:
            parts.configs["scheduler"]["prediction_type"] = prediction_type
        tokenizers = {name: load_tokenizer(path / name) for name in map(tokenizer_name, text_encoders(parts))}
    else:
        parts = read_single_file(open_tensors(path), prediction_type=prediction_type, ema=ema)
        tokenizers = {name: clip_tokenizer(config["pad_token"]) for name, config in parts.configs.items()
                      if name.startswith("tokenizer")}  # fmt: skip
    if vae is not None:
        _replace_vae(parts, vae, revision, variant)
    return build(parts, tokenizers, dtype=dtype, name=str(source))


def load_controlnet(
    source: str | Path, *, dtype: str | None = None, revision: str | None = None, variant: str | None = None,
) -> ControlNet:  # fmt: skip
    """A ControlNet from a hub id, a diffusers folder or a single file in either layout.

    Arguments and errors are those of `load`.
    """
    dtype = dtype or default_dtype()
    dtype_of(dtype)
    path = resolve(source, component_weights(variant), revision=revision)
    parts = _component(path, "controlnet", variant)
    return network("controlnet", parts, dtype, str(source))


def blank(folder: str | Path, *, seed: int = 0, dtype: str | None = None) -> Model:
    """A model that knows nothing yet: random weights out of `seed`, in the shapes that a diffusers folder describes.

    Only the configurations and the tokenizers of the folder are read, so it needs no weights. Training starts from
    such a model. Raises FileError for a folder that is not whole, and as `load`.
    """
    dtype = dtype or default_dtype()
    dtype_of(dtype)
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise FileError(f"{path} is no folder; a model without weights starts from one with configurations.")
    parts = read_folder(path, weights=False)
    tokenizers = {name: load_tokenizer(path / name) for name in map(tokenizer_name, text_encoders(parts))}

    def new(part: str, parts: Parts, dtype: str, name: str) -> Any:
        made = CLASSES[part][0](config_of(part, parts, name), rngs=nnx.Rngs(seed))
        return jax.tree.map(lambda a: a.astype(dtype), made)

    return build(parts, tokenizers, dtype=dtype, name=str(folder), make=new)


def build(
    parts: Parts, tokenizers: dict[str, Tokenizer], *, dtype: str, name: str, make: Callable[..., Any] | None = None
) -> Model:
    """A model out of its described parts, each by `make`, which is `network` if it is None.

    Raises FileError if a part is missing, and as `load`.
    """
    make = make or network
    if "unet" not in parts.tensors:
        held = ", ".join(parts.tensors) or "nothing"
        raise FileError(f"{name} is not a whole model: it holds {held} and no UNet.")
    missing = list(parts.missing)
    if parts.family is None:
        missing = [] if "vae" in parts.tensors else ["vae"]
        missing += [] if text_encoders(parts) else ["text_encoder"]
    if missing:
        hint = "; name one with vae=." if missing == ["vae"] else "."
        raise FileError(f"{name} is not a whole model: it has no {' and no '.join(missing)}{hint}")
    if "scheduler" not in parts.configs:
        raise FileError(f"{name} does not say how it was trained: its UNet is none of SD 1.x, 2.x or XL.")
    schedule = Schedule.from_config(parts.configs["scheduler"])
    networks = {part: make(part, parts, dtype, name) for part in ("unet", "vae", *text_encoders(parts))}
    unet, autoencoder = networks.pop("unet"), networks.pop("vae")
    return Model(
        unet,
        autoencoder,
        networks,
        tokenizers,
        schedule,
        family_of_model(unet.config, networks),
        name,
        parts.configs.get("index", {}),
    )


def network(part: str, parts: Parts, dtype: str, name: str) -> Any:
    """One network of a model, filled."""
    return fill(
        abstract(CLASSES[part][0], config_of(part, parts, name)), parts.tensors[part], dtype=dtype,
        what=f"the {part} of {name}", ignore=lambda key: BUFFERS.fullmatch(key) is not None,
    )  # fmt: skip


def config_of(part: str, parts: Parts, name: str) -> Any:
    """The configuration of a network."""
    return from_dict(CLASSES[part][1], parts.configs[part], f"{name} ({part})")


def text_encoders(parts: Parts) -> list[str]:
    """The text encoders that there are, by component name."""
    return sorted(name for name in parts.tensors if name.startswith("text_encoder"))


def tokenizer_name(text_encoder: str) -> str:
    """The tokenizer of a text encoder, by component name."""
    return text_encoder.replace("text_encoder", "tokenizer")


def default_dtype() -> str:
    """bfloat16 where the hardware is made for it, float32 on CPU."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _component(path: Path, part: str, variant: str | None) -> Parts:
    """A single network from its folder or file. Raises FileError if it is something else."""
    if path.is_dir():
        if (path / "model_index.json").exists():
            raise FileError(f"{path} is a whole model and not a {part}; load() takes it.")
        config = read_json(path / "config.json")
        made = config.get("_class_name", "")
        wanted = {"controlnet": "ControlNetModel", "vae": "AutoencoderKL"}[part]
        if made and made != wanted:
            raise FileError(f"{path} holds a network of the class {made}, and {wanted} was asked for.")
        return Parts(None, {part: config}, {part: read_component(path, part, variant=variant)})
    parts = read_single_file(open_tensors(path))
    if part not in parts.tensors:
        raise FileError(f"{path} holds {', '.join(parts.tensors)} and no {part}.")
    return parts


def _replace_vae(parts: Parts, source: str | Path, revision: str | None, variant: str | None) -> None:
    path = resolve(source, component_weights(variant), revision=revision)
    other = _component(path, "vae", variant)
    config = dict(other.configs["vae"])
    if not path.is_dir() and "vae" in parts.configs:
        # A lone file does not tell its scaling; the model that it goes into does.
        config["scaling_factor"] = parts.configs["vae"].get("scaling_factor", config.get("scaling_factor"))
    parts.configs["vae"], parts.tensors["vae"] = config, other.tensors["vae"]
