"""From the tensors of one layer in a file to the change that they make.

The roles of tensors by their names, and what each says about shapes: of LoRA as kohya, diffusers, PEFT and cloneofsimo
store it, and of the relatives in LyCORIS (arXiv:2309.14859), whose names PEFT uses as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from sfumato.adapters.delta import Delta, Full, LoHa, LoKr, LowRank
from sfumato.io.broken import plain
from sfumato.io.lazy import LazyTensor

ROLES: tuple[tuple[re.Pattern[str], str], ...] = tuple((re.compile(pattern), role) for pattern, role in (
    (r"(lora_down|lora\.down|lora_linear_layer\.down|down|lora_A(\.(?!bias|weight)\w+)?)(\.weight)?", "down"),
    (r"(lora_up|lora\.up|lora_linear_layer\.up|up|lora_B(\.(?!bias|weight)\w+)?)(\.weight)?", "up"),
    (r"(lora_mid|lora\.mid)(\.weight)?", "mid"),
    (r"(lora\.)?alpha", "alpha"),
    (r"(lora\.)?dora_scale|lora_magnitude_vector(\.\w+)*", "magnitude"),
    (r"((?:hada|lokr)_(?:w[12](?:_[ab])?|t[12]))(\.weight)?", r"\1"),
    (r"diff|w_norm", "diff"),
    (r"diff_b|b_norm", "bias"),
))  # fmt: skip
"""The role of a tensor by its name within a layer."""

LORA = {"down": "R I *", "up": "O R +"}
TUCKER = {"down": "R I +", "mid": "R R *", "up": "O R +"}
LOHA = {"hada_w1_a": "O R", "hada_w1_b": "R I", "hada_w2_a": "O S", "hada_w2_b": "S I"}
LOHA_TUCKER = {
    "hada_t1": "R R k l", "hada_w1_a": "R O", "hada_w1_b": "R I",
    "hada_t2": "S S k l", "hada_w2_a": "S O", "hada_w2_b": "S I",
}  # fmt: skip
FIRST = ({"lokr_w1": "A C +"}, {"lokr_w1_a": "A R", "lokr_w1_b": "R C"})
SECOND = (
    {"lokr_w2": "B D *"},
    {"lokr_w2_a": "B S", "lokr_w2_b": "S D"},
    {"lokr_t2": "S S k l", "lokr_w2_a": "S B", "lokr_w2_b": "S D"},
)
LAYOUTS: tuple[tuple[type[Any], Mapping[str, str]], ...] = (
    (LowRank, LORA), (LowRank, TUCKER), (LoHa, LOHA), (LoHa, LOHA_TUCKER),
    *((LoKr, first | second) for first in FIRST for second in SECOND),
    (Full, {"diff": "*"}), (Full, {"bias": "O"}), (Full, {"diff": "*", "bias": "O"}),
)  # fmt: skip
"""The sets of tensors that make a layer's change, with their axes: equal letters are equal sizes, `*` stands for any
further axes and `+` for further axes of size 1."""

NAMES = {"down": "lora_down", "up": "lora_up", "mid": "lora_mid", "bias": "diff_b", "magnitude": "dora_scale"}


def roles(parts: Mapping[str, LazyTensor]) -> dict[str, LazyTensor] | str:
    """The tensors of a layer by role, its alpha being a number; a string says what is wrong with one."""
    found: dict[str, LazyTensor] = {}
    for name, tensor in parts.items():
        role = next((match.expand(role) for pattern, role in ROLES if (match := pattern.fullmatch(name))), None)
        if role is None:
            return f"its tensor {plain(name)} is of no known kind"
        if role in found:
            return f"it has two tensors for {NAMES.get(role, role)}"
        if role == "magnitude" and "magnitude_vector" in name:
            # PEFT keeps a number for each output, for convolutions as [1, O, 1, 1].
            size = math.prod(tensor.shape)
            tensor = tensor.map((size,), lambda array: array.reshape(-1))
        found[role] = tensor
    if "alpha" in found and not np.isfinite(alpha(found) or 0.0):
        return f"its alpha {list(found['alpha'].shape)} is no finite number"
    return found


def delta(tensors: Mapping[str, LazyTensor], scale: float) -> Delta | str:
    """The change, made of arrays that are not read yet if they lie in a file; a string says why there is none."""
    held = {role: tensor for role, tensor in tensors.items() if role not in ("alpha", "magnitude")}
    found = next((entry for entry in LAYOUTS if entry[1].keys() == held.keys()), None)
    if found is None:
        return _incomplete(set(held))
    kind, axes = found
    wrong = next(
        (t for t in tensors.values() if not (np.issubdtype(t.dtype, np.floating) or t.dtype.kind == "V")), None
    )
    if wrong and wrong is not tensors.get("alpha"):
        return f"it holds numbers of the type {wrong.dtype}"
    if not _consistent(held, axes):
        shapes = ", ".join(f"{NAMES.get(role, role)} {list(tensor.shape)}" for role, tensor in held.items())
        return f"its tensors do not fit each other: {shapes}"
    if "magnitude" in tensors:
        held["magnitude"] = tensors["magnitude"]
    fields: dict[str, Any] = {re.sub(r"^(hada|lokr)_", "", role): tensor.read() for role, tensor in held.items()}
    if kind is not Full:
        fields["scale"] = np.asarray(scale, np.float32)
    return kind(**fields)


def rank(tensors: Mapping[str, LazyTensor]) -> int | None:
    """The rank by which alpha is divided; None for changes that are whole."""
    first = next((tensors[role] for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b") if role in tensors), None)
    return first.shape[0] if first is not None and first.shape else None


def alpha(tensors: Mapping[str, LazyTensor]) -> float | None:
    """The number that a file has for alpha, NaN if it is not one; None if there is none."""
    if "alpha" not in tensors:
        return None
    values = tensors["alpha"].read().astype(np.float64).reshape(-1)
    return float(values[0]) if len(values) == 1 else math.nan


def _consistent(tensors: Mapping[str, LazyTensor], axes: Mapping[str, str]) -> bool:
    """Whether the shapes are those of a layout."""
    sizes: dict[str, int] = {}
    for role, tensor in tensors.items():
        letters = axes[role].split()
        rest = letters.pop() if letters[-1] in "*+" else ""
        shape, more = tensor.shape[: len(letters)], tensor.shape[len(letters) :]
        if 0 in tensor.shape or len(shape) < len(letters) or (more and rest != "*" and (not rest or set(more) != {1})):
            return False
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape, strict=True)):
            return False
    return True


def _incomplete(held: set[str]) -> str:
    """What is missing, in words."""
    if not held:
        return "it has an alpha and no matrices"
    near = max((axes.keys() for _, axes in LAYOUTS), key=lambda axes: len(held & axes) / len(held | axes))
    missing, extra = sorted(near - held), sorted(held - near)
    if missing:
        return f"it has {_list(sorted(held))} and no {_list(missing)}"
    return f"it has {_list(extra)} beside {_list(sorted(near))}"


def _list(held: list[str]) -> str:
    return " and ".join(NAMES.get(role, role) for role in held)
