"""Checkpoints in one file: the original layout of Stable Diffusion and of ControlNet, or single parts in either layout.

Tensors are renamed, split and turned on demand; nothing is read here but what tells a model's prediction type.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import FileError
from sfumato.io import defaults, infer, original
from sfumato.io.family import FAMILY_OF_CONTEXT, Family, family_of_context
from sfumato.io.foreign import foreign
from sfumato.io.lazy import LazyTensor, TensorFile
from sfumato.io.original_names import ema_name

Tensors = dict[str, LazyTensor]

PREFIXES = {
    "model.diffusion_model.": "unet",
    "control_model.": "controlnet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.transformer.": "clip",
    "conditioner.embedders.0.transformer.": "clip",
    "cond_stage_model.model.": "open_clip",
    "conditioner.embedders.0.model.": "open_clip",
    "conditioner.embedders.1.model.": "open_clip",
}
"""Where the original layout keeps its networks."""

BARE = {
    "input_hint_block.0.weight": "controlnet", "controlnet_cond_embedding.conv_in.weight": "controlnet",
    "input_blocks.0.0.weight": "unet", "down_blocks.0.resnets.0.conv1.weight": "unet",
    "encoder.conv_in.weight": "vae", "decoder.conv_in.weight": "vae",
}  # fmt: skip
"""Tensors that tell a file with just one network, without a prefix. The first that is there counts."""

IGNORED = tuple(map(re.compile, (
    # the noise schedule, which follows from three numbers
    r"(sqrt_(one_minus_|recipm?1?_)?|log_one_minus_)?alphas_cumprod(_prev)?$", r"betas$", r"logvar$", r"lvlb_weights$",
    r"posterior_(variance|log_variance_clipped|mean_coef[12])$", r"denoiser\.sigmas$", r"scale_factor$",
    # markers of the prediction type
    r"(v_pred|ztsnr)$",
    # averaged copies, and what only training needs
    r"model_ema\.", r"((first_stage_model|vae)\.)?(loss|model_ema)\.",
    # the depth estimator beside SD2-depth, and the halves of CLIP that look at pictures
    r"depth_model\.", r"\S+\.visual\.",
    # constants, and the output layers of text encoders whose pooled features nobody uses
    r"\S+\.(position_ids|logit_scale|attn_mask)$",
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection\.weight$",
)))  # fmt: skip
"""Keys that are known to be of no use here."""


@dc.dataclass(frozen=True)
class Parts:
    """What a single file holds, in the terms of a diffusers folder."""

    family: Family | None
    """None where the file does not tell (a lone autoencoder)."""
    configs: dict[str, dict[str, Any]]
    """By component ("unet", "vae", "text_encoder", "text_encoder_2", "controlnet", "scheduler", "tokenizer",
    "tokenizer_2", and "index" for the model as a whole), the contents of its JSON file. A lone autoencoder gets the
    scaling factor of SD 1.x and 2.x; in an SDXL model it takes SDXL's."""
    tensors: dict[str, Tensors]
    """By component, the tensors by diffusers keys. Keys that belong to nothing known keep their names."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The components that a whole model of this family would have besides."""
        whole = defaults.COMPONENTS[self.family] if self.family else ()
        return tuple(name for name in whole if name not in self.tensors)


@dc.dataclass(frozen=True)
class Section:
    """The tensors of one network in a file."""

    kind: str
    prefix: str
    tensors: Tensors

    @property
    def component(self) -> str:
        """Its name in a diffusers folder. SDXL has its OpenCLIP encoder second, even where it is the only one."""
        if self.kind == "open_clip":
            norm = self.tensors.get("ln_final.weight")
            first = self.prefix.startswith("cond_stage_model.") or (norm and norm.shape == (original.SD2_WIDTH,))
            return "text_encoder" if first else "text_encoder_2"
        return "text_encoder" if self.kind == "clip" else self.kind


def read_single_file(file: TensorFile, *, prediction_type: str | None = None, ema: bool = False) -> Parts:
    """Takes a single file to pieces.

    `prediction_type` ("epsilon", "v_prediction" or "sample") overrides what `defaults.predicts` finds out; `ema`
    takes the averaged copy of the UNet's weights. Raises FileError if the file is something else or has no averaged
    weights, MismatchError if a network in it is not whole, SfumatoError for an unknown prediction type.
    """
    name = file.path.name
    what = foreign(file.tensors)
    if what:
        raise FileError(f"{name} is {what}, not a checkpoint or ControlNet of SD 1.x, 2.x or XL.")
    sections, loose = split(file.tensors)
    if not sections:
        first = next(iter(file.tensors), None)
        held = f"tensors such as {first}" if first else "nothing at all"
        raise FileError(f"{name} holds no network of SD 1.x, 2.x or XL, but {held}.")
    tensors: dict[str, Tensors] = {}
    configs: dict[str, dict[str, Any]] = {}
    for section in sections:
        section = averaged(section, file) if ema and section.kind == "unet" else section
        tensors[section.component], found = read_section(section)
        configs |= found
    tensors[sections[0].component] |= loose
    return Parts(complete(file, configs, tensors, prediction_type), configs, tensors)


def split(tensors: Mapping[str, LazyTensor]) -> tuple[list[Section], Tensors]:
    """The networks in a file, and what is in none of them nor known to be of no use."""
    found: dict[str, Tensors] = {}
    loose: Tensors = {}
    for key, tensor in tensors.items():
        if any(pattern.match(key) for pattern in IGNORED):
            continue
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
        if prefix is None:
            loose[key] = tensor
        else:
            found.setdefault(prefix, {})[key.removeprefix(prefix)] = tensor
    bare = next((kind for key, kind in BARE.items() if key in loose), None)
    if bare and not found:
        return [Section(bare, "", loose)], {}
    return [Section(PREFIXES[prefix], prefix, section) for prefix, section in sorted(found.items())], loose


def read_section(section: Section) -> tuple[Tensors, dict[str, dict[str, Any]]]:
    """A network's tensors by diffusers keys, and its configurations by component."""
    tensors = getattr(original, section.kind)(section.tensors, section.prefix)
    if section.kind not in ("clip", "open_clip"):
        return tensors, {section.kind: getattr(infer, f"{section.kind}_config")(tensors)}
    activation = "quick_gelu" if section.kind == "clip" else "gelu"
    tokenizer = defaults.CLIP_TOKENIZER if section.kind == "clip" else defaults.OPEN_CLIP_TOKENIZER
    return tensors, {
        section.component: infer.text_config(tensors, activation=activation),
        section.component.replace("text_encoder", "tokenizer"): dict(tokenizer),
    }


def averaged(section: Section, file: TensorFile) -> Section:
    """The UNet with the averaged copy of its weights; FileError if there is none, or not of all."""
    names = {path: ema_name(path) for path in section.tensors}
    missing = [name for name in names.values() if name not in file.tensors]
    if missing:
        raise FileError(
            f"{file.path.name} has no averaged (EMA) weights for {len(missing)} of {len(names)} tensors"
            f" of its UNet ({missing[0]})."
        )
    return dc.replace(section, tensors={path: file.tensors[name] for path, name in names.items()})


def complete(
    file: TensorFile, configs: dict[str, dict[str, Any]], tensors: Mapping[str, Tensors], prediction_type: str | None
) -> Family | None:
    """Adds what does not show in shapes to `configs`, and returns the family."""
    family = family_of(configs)
    if "unet" in configs:
        if family is None:
            width, widths = configs["unet"].get("cross_attention_dim"), ", ".join(map(str, FAMILY_OF_CONTEXT))
            raise FileError(f"The UNet in {file.path.name} looks at text features of width {width}, which no known"
                            f" family has ({widths}).")  # fmt: skip
        configs["scheduler"] = defaults.scheduler_config(file, family, tensors["unet"], prediction_type)
        configs["index"] = dict(defaults.INDEX[family])
        small = family is Family.SD2 and configs["scheduler"]["prediction_type"] == "epsilon"
        configs["unet"]["sample_size"] = 64 if small else defaults.LATENT_SIZE[family]
    if "vae" in configs:
        channels = configs["vae"]["latent_channels"]
        if channels != defaults.LATENT_CHANNELS:
            raise FileError(f"The autoencoder in {file.path.name} has {channels} latent channels; SD 1.x, 2.x and XL"
                            f" have {defaults.LATENT_CHANNELS}.")  # fmt: skip
        size = defaults.LATENT_SIZE[family or Family.SD1]
        configs["vae"] |= {"scaling_factor": defaults.SCALING[family or Family.SD1], "sample_size": 8 * size}
    if "controlnet" in configs:
        # The one net that averages its residuals is known by its file's name alone.
        configs["controlnet"]["global_pool_conditions"] = bool(re.search(r"_shuffle(_fp16)?$", file.path.stem))
    return family


def family_of(configs: Mapping[str, Mapping[str, Any]]) -> Family | None:
    """The family of a model's (or ControlNet's) configurations by component; None if it is none that is known."""
    network = configs.get("unet") or configs.get("controlnet") or {}
    return family_of_context(network.get("cross_attention_dim"))
