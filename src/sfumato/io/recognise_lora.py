"""The many ways in which low-rank adapters (LoRA, arXiv:2106.09685, and its relatives) are stored.

Names of tensors are facts of the programs that write them: kohya-ss/sd-scripts, LyCORIS, diffusers, PEFT and
cloneofsimo/lora. This only tells them apart; it does not convert.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from sfumato.io.broken import plain
from sfumato.io.family import CONTEXT_KEY, FAMILY_OF_TEXT, Family, family_of_context
from sfumato.io.tensors import LazyTensor, TensorFile

SPLITS: tuple[tuple[str, re.Pattern[str]], ...] = tuple((name, re.compile(pattern)) for name, pattern in (
    ("cloneofsimo", r"(?P<module>(unet|text_encoder):\d+):(?P<part>up|down)$"),
    ("kohya", r"(?P<module>(lora_(unet|te\d?|prior_te|controlnet)|lycoris)_[^.]+)\.(?P<part>.+)$"),
    ("PEFT", r"(?P<module>base_model\.model\..+?)\.(?P<part>lora_(A|B|magnitude_vector|embedding_[AB])\b.*"
             r"|(hada|lokr)_\w+)$"),
    ("diffusers (old)",
     r"(?P<module>.+\.(processor|self_attn)\.[a-z_]+?)_lora\.(?P<part>(down|up)\.weight|alpha)$"),
    ("diffusers", r"(?P<module>.+?)\.(?P<part>(lora|lora_linear_layer)\.(down|up|mid)\.weight|lora_(A|B)\b.*"
                  r"|lora_(down|up|mid)\.weight|(hada|lokr)_\w+|lora_magnitude_vector.*|(lora\.)?(dora_scale|alpha))$"),
))  # fmt: skip
"""By format, how a key names the layer that is changed (module) and the role of the tensor (part)."""

VARIANTS: tuple[tuple[str, str], ...] = (
    ("LoHa", r"hada_"), ("LoKr", r"lokr_"), ("OFT", r"oft_"), ("IA3", r"on_input$"), ("GLoRA", r"[ab][12]\.weight$"),
    ("full difference", r"diff(_b)?$|[wb]_norm$"),
)  # fmt: skip
"""Relatives of LoRA by the parts that only they have."""

UNUSED = {"OFT", "IA3", "GLoRA"}
"""Relatives that change a layer by other means than adding to its weights; none of them is applied here."""

DOWN = re.compile(r"(lora_down|lora\.down|lora_linear_layer\.down|down|lora_A(\.\w+)?)(\.weight)?$")
UP = re.compile(r"(lora_up|lora\.up|lora_linear_layer\.up|up|lora_B(\.\w+)?)(\.weight)?$")
RANKS = re.compile(r"(hada_w1_b|lokr_w[12]_b)$")
DOUBLED = re.compile(r"(lora_unet_unet_|lora_unet_lora_unet_|lora_te_te_|lora_te_lora_te_|unet\.unet\.)")

OTHERS: tuple[tuple[str, str], ...] = (
    ("FLUX", r"(single_transformer_blocks|double_blocks|single_blocks)[._]"),
    ("Stable Diffusion 3", r"joint_blocks[._]|^transformer\.transformer_blocks\."),
    ("a transformer model", r"^(transformer|diffusion_model(?!\.(input|middle|output)_block))\.|"
                            r"^lora_(unet_)?(transformer|blocks)[._]"),
)  # fmt: skip
"""Models of other families, by their layers."""


Modules = dict[str, dict[str, LazyTensor]]


@dc.dataclass(frozen=True)
class LoraFinding:
    """What was found out about an adapter."""

    family: Family | None
    details: dict[str, str]
    problem: str | None
    modules: Modules
    """By the name of the layer in the file, its tensors by the rest of their names."""
    tokens: tuple[str, ...]
    """New tokens whose vectors the file carries."""
    rest: tuple[str, ...]
    """The keys that are none of these."""


def recognise_lora(file: TensorFile) -> LoraFinding | None:
    """Format, variant, rank, layers and family of an adapter; None if the file is none."""
    form, modules, rest = split(file.tensors)
    if not modules:
        return None
    family = _family(modules, file.metadata)
    sides = {"text encoder" if re.match(r"lora_te|text_encoder", name.removeprefix("base_model.model."))
             else "unet" for name in modules}  # fmt: skip
    details = {
        "format": form,
        "variant": _variant(modules),
        "rank": _rank(modules),
        "alphas": _alphas(form, modules),
        "layers": f"{len(modules)} of {' and '.join(sorted(sides, reverse=True))}",
    }
    tokens, rest = _tokens(file, rest)
    if tokens:
        details["embedded tokens"] = plain(", ".join(tokens))
    if rest:
        details["other tensors"] = f"{len(rest)} ({plain(rest[0])})"
    return LoraFinding(family, details, _problem(modules, family), modules, tokens, rest)


def split(tensors: Mapping[str, LazyTensor]) -> tuple[str, Modules, list[str]]:
    """The format, {layer: {part: tensor}}, and the keys that belong to no layer."""
    modules: Modules = {}
    forms: Counter[str] = Counter()
    rest: list[str] = []
    for key, tensor in _listed(tensors).items():
        form, match = next(((form, match) for form, pattern in SPLITS if (match := pattern.match(key))), ("", None))
        if match is None:
            rest.append(key)
        else:
            forms[form] += 1
            modules.setdefault(match["module"], {})[match["part"]] = tensor
    # A checkpoint may have single keys that look like it; an adapter consists of them.
    if not modules or len(modules) < len(rest) // 4:
        return "", {}, []
    form = forms.most_common(1)[0][0]
    peft = form == "diffusers" and any("lora_A" in part for parts in modules.values() for part in parts)
    return form + (" (PEFT names)" if peft else ""), modules, rest


def _listed(tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """The first files of cloneofsimo's, a list of up, down, up, down without names, under the names that followed.

    In those of text encoders all layers are square and of one size.
    """
    flat = [tensors.get(str(i)) for i in range(len(tensors))]
    found = [tensor for tensor in flat if tensor is not None and len(tensor.shape) == 2]
    ups, downs = found[::2], found[1::2]
    if len(found) < len(tensors) or len(ups) != len(downs) or any(
        up.shape[1] != down.shape[0] for up, down in zip(ups, downs, strict=True)
    ):  # fmt: skip
        return tensors
    sizes = {size for up, down in zip(ups, downs, strict=True) for size in (up.shape[0], down.shape[1])}
    component = "text_encoder" if len(sizes) == 1 else "unet"
    return {f"{component}:{i // 2}:{('up', 'down')[i % 2]}": tensor for i, tensor in enumerate(found)}


def _tokens(file: TensorFile, keys: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The new tokens among the keys, and the keys that are none: cloneofsimo's, whose metadata says so, and those that
    other programs put into a LoRA as the whole file of an embedding under `bundle_emb.<token>`."""
    tokens: dict[str, None] = {}
    rest: list[str] = []
    for key in keys:
        _, *bundled = key.split(".", 2)
        if file.metadata.get(key) == "<embed>":
            tokens[key] = None
        elif key.startswith("bundle_emb.") and len(bundled) == 2:
            tokens[bundled[0]] = None
        else:
            rest.append(key)
    return tuple(tokens), tuple(rest)


def _variant(modules: Modules) -> str:
    parts = {part for layer in modules.values() for part in layer}
    names = [name for name, pattern in VARIANTS if any(re.match(pattern, part) for part in parts)]
    downs = [tensor for layer in modules.values() for part, tensor in layer.items() if DOWN.match(part)]
    if downs:
        wide = any(len(tensor.shape) == 4 and tensor.shape[2:] != (1, 1) for tensor in downs)
        names.insert(0, "LoCon (LoRA with convolutions)" if wide else "LoRA")
    if any("dora_scale" in part or "lora_magnitude_vector" in part for part in parts):
        names.append("DoRA")
    return " + ".join(names) or "unknown"


def _rank(modules: Modules) -> str:
    ranks = {tensor.shape[0] for layer in modules.values() for part, tensor in layer.items()
             if (DOWN.match(part) or RANKS.match(part)) and tensor.shape}  # fmt: skip
    if not ranks:
        return "full"
    return str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"


def _alphas(form: str, modules: Modules) -> str:
    count = sum("alpha" in layer for layer in modules.values())
    if count == len(modules):
        return "in the file"
    return f"for {count} of {len(modules)} layers" if count else "none, so alpha is the rank" + (
        " or stands in adapter_config.json" if form == "PEFT" else "")  # fmt: skip


def _inputs(parts: Mapping[str, LazyTensor]) -> int | None:
    """The number of inputs of the layer that is changed."""
    shapes = {re.sub(r"\.weight$", "", part): tensor.shape for part, tensor in parts.items()}
    for part, shape in shapes.items():
        if len(shape) >= 2 and (DOWN.match(part) or part in ("hada_w1_b", "diff")):
            return shape[1]
    # A Kronecker product has the inputs of both its factors, multiplied.
    factors = [shape[1] for i in (1, 2) for name in (f"lokr_w{i}", f"lokr_w{i}_b")
               if len(shape := shapes.get(name, ())) >= 2]  # fmt: skip
    return factors[0] * factors[1] if len(factors) == 2 else None


def _family(modules: Modules, metadata: Mapping[str, str]) -> Family | None:
    """By the inputs of cross-attention, the depth of the transformers, the text encoders, or the metadata."""
    widths = {_inputs(parts) for name, parts in modules.items() if CONTEXT_KEY.search(name)}
    if not widths:
        # Layers have numbers for names in cloneofsimo's format, but only cross-attention can have these inputs.
        widths = {_inputs(parts) for name, parts in modules.items() if name.startswith("unet:")} & {768, 1024, 2048}
    widths -= {None}
    if widths:
        return family_of_context(list(widths))
    if any(re.match(r"lora_te2_|text_encoder_2\.", name) or re.search(r"transformer_blocks[._][1-9]", name)
           for name in modules) and not _other(modules):  # fmt: skip
        return Family.SDXL
    text = {_inputs(parts) for name, parts in modules.items()
            if re.search(r"q_proj|k_proj", name) and not re.match(r"lora_te1", name)}  # fmt: skip
    if len(text) == 1 and (width := text.pop()) in FAMILY_OF_TEXT:
        return FAMILY_OF_TEXT[width]
    said = f"{metadata.get('modelspec.architecture', '')} {metadata.get('ss_base_model_version', '')}"
    for sign, family in (("xl", Family.SDXL), ("v2", Family.SD2), ("v1", Family.SD1)):
        if sign in said:
            return family
    return None


def _other(modules: Modules) -> str | None:
    return next((name for name, pattern in OTHERS if any(re.search(pattern, key) for key in modules)), None)


def _problem(modules: Modules, family: Family | None) -> str | None:
    doubled = next((match for name in modules if (match := DOUBLED.match(name))), None)
    if doubled:
        return (f"its keys begin with {doubled[0]}, a prefix that was put before them twice, so no loader finds its "
                "layers; the program that wrote it needs mending or the keys renaming")  # fmt: skip
    halves = [name for name, parts in modules.items()
              if any(map(DOWN.match, parts)) != any(map(UP.match, parts))]  # fmt: skip
    if halves:
        return f"{len(halves)} of its {len(modules)} layers have only one of the two matrices ({plain(halves[0])})"
    unused = UNUSED & set(_variant(modules).split(" + "))
    if unused:
        return f"it is an adapter of the kind {min(unused)}, which sfumato does not apply"
    other = None if family else _other(modules)
    return f"it is made for {other}, which sfumato does not run" if other else None
