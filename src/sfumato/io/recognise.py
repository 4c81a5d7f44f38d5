"""What the tensors of a file are, by their names and shapes."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Callable, Mapping

from sfumato.io.broken import plain
from sfumato.io.family import FAMILY_OF_TEXT, Family, family_of_tensors, purpose_of
from sfumato.io.foreign import foreign
from sfumato.io.recognise_lora import recognise_lora
from sfumato.io.single_file import split
from sfumato.io.tensors import LazyTensor, TensorFile

Tensors = Mapping[str, LazyTensor]

PARTS = {"clip": "text encoder (CLIP)", "open_clip": "text encoder (OpenCLIP)"}
"""What we call the networks of a single file, where not by their own names."""

ENDS = (("input_blocks.0.0.weight", "conv_in.weight"), ("out.2.weight", "conv_out.weight"))
"""The first and the last convolution of a UNet, in either layout."""

BESIDES = {"model_ema.": "averaged weights", "depth_model.": "depth estimator"}
"""What checkpoints may hold besides, by the beginning of the keys."""

LATENTS = {4: "SD 1.x, 2.x and SDXL", 16: "SD 3 and FLUX.1", 32: "FLUX.2"}
"""Which models have so many latent channels."""

HINTS = ("input_hint_block.0.weight", "controlnet_cond_embedding.conv_in.weight")
TOKENS = {
    "text_model.embeddings.token_embedding.weight": "transformers",
    "embeddings.token_embedding.weight": "transformers",
    "token_embedding.weight": "OpenCLIP",
}
"""Keys of the table of tokens, by layout."""

TINY = re.compile(r"((encoder|decoder)\.layers\.)?\d+\.(weight|bias|(conv|pool)\.\d+\.(weight|bias)|skip\.weight)")
MOST_TOKENS = 64

STRANGE = "its cross-attention fits the text features of none of the known families"
"""The problem of a network whose text features have a width of their own."""


@dc.dataclass(frozen=True)
class Finding:
    """What was found out about a file."""

    kind: str
    family: Family | None = None
    details: dict[str, str] = dc.field(default_factory=dict)
    problem: str | None = None


def recognise(file: TensorFile) -> Finding:
    """What the file is; of the kind "unknown", with its first keys, if it is nothing known."""
    finding = next(filter(None, (look(file) for look in LOOKS)), None)
    if finding:
        return finding
    first = ", ".join(plain(key) for key in list(file.tensors)[:4])
    return Finding("unknown", details={"first keys": first or "none"})


def _lora(file: TensorFile) -> Finding | None:
    lora = recognise_lora(file)
    return Finding("lora", lora.family, lora.details, lora.problem) if lora else None


def _embedding(file: TensorFile) -> Finding | None:
    """Textual inversion (arXiv:2208.01618): a few vectors that stand for new words."""
    tensors = file.tensors
    automatic = {key.removeprefix("string_to_param."): value for key, value in tensors.items()
                 if key.startswith("string_to_param.")}  # fmt: skip
    if automatic:
        layout, token = "AUTOMATIC1111", file.metadata.get("name") or ", ".join(automatic)
        vectors: Tensors = automatic
    elif set(tensors) in ({"clip_l", "clip_g"}, {"clip_l"}, {"clip_g"}):
        layout, token, vectors = "SDXL pair", file.metadata.get("name", file.path.stem), tensors
    elif set(tensors) == {"emb_params"}:
        layout, token, vectors = "AUTOMATIC1111", file.metadata.get("name", file.path.stem), tensors
    else:
        layout, token, vectors = "diffusers", ", ".join(tensors), tensors
        if len(tensors) > MOST_TOKENS or any(re.search(r"\.(weight|bias|alpha)$", key) for key in tensors):
            return None
    widths = {tensor.shape[-1] if tensor.shape else 0 for tensor in vectors.values()}
    flat = all(len(tensor.shape) in (1, 2) for tensor in vectors.values())
    if not vectors or not flat or not widths <= FAMILY_OF_TEXT.keys():
        return None if layout == "diffusers" else Finding(
            "textual inversion", None, {"layout": layout}, f"its vectors are {_join(widths)} wide, which is no text "
            "encoder of SD 1.x, 2.x or XL")  # fmt: skip
    count = max(1 if len(tensor.shape) == 1 else tensor.shape[0] for tensor in vectors.values())
    family = Family.SDXL if widths == {768, 1280} else FAMILY_OF_TEXT[widths.pop()] if len(widths) == 1 else None
    details = {"layout": layout, "tokens": plain(token), "vectors per token": str(count)}
    if layout == "AUTOMATIC1111" and "sd_checkpoint_name" in file.metadata:
        details["trained on"] = plain(file.metadata["sd_checkpoint_name"])
    return Finding("textual inversion", family, details)


def _foreign(file: TensorFile) -> Finding | None:
    what = foreign(file.tensors)
    if what is None:
        return None
    return Finding("unknown", details={"is": what}, problem=f"it is {what}, which sfumato does not load here")


def _networks(file: TensorFile) -> Finding | None:
    """A checkpoint, a ControlNet, or a UNet or VAE alone, in the original or the diffusers layout."""
    tensors = file.tensors
    sections, _ = split(tensors)
    found = {section.kind: section.tensors for section in sections}
    if not found:
        return None
    parts = sorted({PARTS.get(kind, kind) for kind in found})
    parts += [part for prefix, part in BESIDES.items() if _has(tensors, prefix)]
    first = next((found[kind] for kind in ("controlnet", "unet", "vae") if kind in found), {})
    original = any(key.startswith(("input_blocks.", "encoder.mid.", "decoder.mid.")) for key in first)
    details = {"layout": "original" if original else "diffusers"}
    if "controlnet" in found:
        hint = next((first[key] for key in HINTS if key in first), None)
        details |= {"picture channels": str(_axis(hint, 1))} if hint else {}
        others = [part for part in parts if part != "controlnet"]
        details |= {"also holds": ", ".join(others)} if others else {}
        return Finding("controlnet", family_of_tensors(first), details)
    if "unet" in found:
        return _unet(file, first, details, parts, alone=sections[0].prefix == "")
    if "vae" in found:
        return Finding("vae", None, details | _autoencoder(first))
    return Finding("text encoder", None, {"layout": "original", "parts": ", ".join(parts)})


def _unet(file: TensorFile, unet: Tensors, details: dict[str, str], parts: list[str], *, alone: bool) -> Finding:
    """A checkpoint by its UNet, or a UNet `alone`."""
    first, last = (next((unet[key] for key in keys if key in unet), None) for keys in ENDS)
    channels = _axis(first, 1)
    purpose = purpose_of(channels, 4 if last is None else _axis(last, 0))
    details = details | {"input channels": str(channels), "purpose": purpose or "unknown"}
    if not alone:
        lacking = [part for part in ("vae", "text encoder") if not any(name.startswith(part) for name in parts)]
        details |= {"parts": ", ".join(parts)} | ({"lacks": ", ".join(lacking)} if lacking else {})
    if "v_pred" in file.tensors:
        details["prediction"] = "v" + (" with zero terminal SNR" if "ztsnr" in file.tensors else "")
    if "modelspec.title" in file.metadata:
        details["title"] = plain(file.metadata["modelspec.title"])
    family = family_of_tensors(unet)
    problem = None if family else STRANGE
    return Finding("unet" if alone else "checkpoint", family, details, problem)


def _autoencoder(vae: Tensors) -> dict[str, str]:
    halves = [half for half in ("encoder", "decoder") if f"{half}.conv_in.weight" in vae]
    latents = _axis(vae["decoder.conv_in.weight"], 1) if "decoder" in halves else None
    return {"parts": ", ".join(halves)} | _latents(latents)


def _text_encoder(file: TensorFile) -> Finding | None:
    for key, layout in TOKENS.items():
        if key in file.tensors and len(file.tensors[key].shape) == 2:
            tokens, width = file.tensors[key].shape
            details = {"layout": layout, "width": str(width), "vocabulary": f"{tokens} tokens"}
            return Finding("text encoder", FAMILY_OF_TEXT.get(width), details)
    if "concept_embeds" in file.tensors:
        return Finding("unknown", details={"is": "a safety checker"})
    return None


def _tiny(file: TensorFile) -> Finding | None:
    """The tiny autoencoder of https://github.com/madebyollin/taesd, whose layers have numbers for names."""
    tensors = file.tensors
    if not tensors or not all(TINY.fullmatch(key) for key in tensors):
        return None
    if any(key.startswith(("encoder.", "decoder.")) for key in tensors):
        halves = [half for half in ("encoder", "decoder") if _has(tensors, f"{half}.")]
        latents = _axis(_last(tensors, "encoder.layers."), 0) if "encoder" in halves else None
        details = {"layout": "diffusers", "parts": ", ".join(halves)}
        return Finding("tiny autoencoder", None, details | _latents(latents))
    # The decoder begins with a layer that has no weights.
    half = "encoder" if "0.weight" in tensors else "decoder"
    latents = _axis(_last(tensors, ""), 0) if half == "encoder" else _axis(tensors.get("1.weight"), 1)
    return Finding("tiny autoencoder", None, {"layout": "original", "parts": half} | _latents(latents))


LOOKS: tuple[Callable[[TensorFile], Finding | None], ...] = (
    _lora, _embedding, _foreign, _networks, _text_encoder, _tiny,
)  # fmt: skip
"""The first that knows the file counts."""


def _has(tensors: Tensors, prefix: str | tuple[str, ...]) -> bool:
    return any(key.startswith(prefix) for key in tensors)


def _latents(channels: int | None) -> dict[str, str]:
    if channels is None:
        return {}
    return {"latent channels": f"{channels} ({LATENTS.get(channels, 'no known model')})"}


def _axis(tensor: LazyTensor | None, axis: int) -> int:
    """The size of an axis, 0 where there is none."""
    return tensor.shape[axis] if tensor and len(tensor.shape) > axis else 0


def _last(tensors: Tensors, prefix: str) -> LazyTensor | None:
    """The weight of the last layer of a numbered stack."""
    numbers = [int(key.removeprefix(prefix).split(".")[0]) for key in tensors if key.startswith(prefix)]
    return tensors.get(f"{prefix}{max(numbers)}.weight")


def _join(numbers: set[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))
