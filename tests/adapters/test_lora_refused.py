"""Files that do not fit, or are no LoRA at all, are refused in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.adapters.lora_file import load_lora
from sfumato.errors import FileError, MismatchError

from loras import BLOCK, CONV, FLAT, QUERY, WIDTH, draw, kohya, names, one, peft, some, write


def renamed(tensors: Mapping[str, np.ndarray], old: str, new: str) -> dict[str, np.ndarray]:
    return {key.replace(old, new): value for key, value in tensors.items()}


XL = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": some(4, 2048),
      "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": some(640, 4)}  # fmt: skip
BAD: dict[str, tuple[dict[str, np.ndarray], type[Exception], str]] = {
    "a doubled prefix": (renamed(one(), "lora_unet_", "lora_unet_unet_"), FileError, "unet_unet_.* put before them"),
    "half a layer": (one() | one(None, CONV, **{"lora_up.weight": None}), FileError, "1 of its 2 layers have only"),
    "SDXL": (XL, MismatchError, r"a LoRA for Stable Diffusion XL and not made for .* \(Stable Diffusion 1.x\)\.$"),
    "FLUX": (renamed(one(), QUERY.replace(".", "_"), "double_blocks_0_img_attn_qkv"), FileError, "for FLUX"),
    "an unknown layer": (
        one() | renamed(one(), "to_q", "to_quux"), MismatchError,
        f"1 of its 2 layers .*to_quux \\(there is no such layer, the nearest is unet.{BLOCK}.attn1.to_q\\); partial"),
    "another shape": (
        one() | one(None, CONV, **{"lora_down.weight": some(4, 16, 3, 3)}), MismatchError,
        r"conv1 \(it changes a weight of \[32, 16, 3, 3\] and the layer has \[32, 32, 3, 3\]\)"),
    "other ranks": (one(None, **{"lora_down.weight": some(3, WIDTH)}), MismatchError,
                    r"do not fit each other: lora_down \[3, 32\], lora_up \[32, 4\]"),
    "an odd alpha": (one(some(3)), MismatchError, r"its alpha \[3\] is no finite number"),
    "an alpha that is no number": (one(np.float32(np.nan)), MismatchError, "its alpha .* is no finite number"),
    "whole numbers": (one(None, **{"lora_up.weight": np.ones((WIDTH, 4), np.int32)}), MismatchError, "the type int32"),
    "a stray tensor": (one() | {"stray": some(3)}, MismatchError, r"stray \(it belongs to no layer\); partial=True"),
    "an unknown tensor": (one(None, what=some(3)), MismatchError, "its tensor what is of no known kind"),
    "two sorts": (one(None, diff=some(WIDTH, WIDTH)), MismatchError, "it has diff beside lora_down and lora_up"),
    "an alpha alone": (one() | {f"{FLAT[CONV]}.alpha": some()}, MismatchError, "it has an alpha and no matrices"),
    "a bias of another length": (
        {f"{FLAT[CONV]}.diff_b": some(7)}, MismatchError, "it changes a bias of 7 and the layer has 32"),
    "a bias where none is": ({f"{FLAT[QUERY]}.diff_b": some(32)}, MismatchError, "a bias of 32 and the layer has none"),
    "a layer twice": (one() | renamed(one(), "down_blocks_0_attentions_0", "input_blocks_1_1"), MismatchError,
                      f"the file changes unet.{QUERY} twice"),
    "OFT": ({f"{FLAT[QUERY]}.oft_blocks": some(4, 8, 8)}, FileError, "of the kind OFT, which sfumato does not apply"),
    "a magnitude of another length": (
        one(None, dora_scale=some(5, 1)), MismatchError, "its magnitude has .5, 1. numbers and the layer's weight is"),
    "no rank": (
        one(None, **{"lora_down.weight": some(0, WIDTH), "lora_up.weight": some(WIDTH, 0)}), MismatchError,
        "do not fit each other"),
    "numbers that are not finite": (
        one(None, **{"lora_up.weight": np.full((WIDTH, 4), np.inf, np.float32)}), FileError,
        f"not finite in its change of unet.{QUERY}, so it is damaged"),
    "a checkpoint": ({"input_blocks.0.0.weight": some(4, 4, 3, 3)}, FileError, "holds no LoRA but a unet"),
    "an embedding": ({"<cat>": some(768)}, FileError, "no LoRA but a textual inversion of Stable Diffusion 1.x"),
    "something else": ({"a.weight": some(2)}, FileError, "no LoRA but tensors such as a.weight"),
    "nothing": ({}, FileError, "holds no LoRA but nothing at all"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_sentence(name: str, loaded: Any, tmp_path: Path) -> None:
    tensors, kind, words = BAD[name]
    file = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises((FileError, MismatchError), match=words) as caught:
        load_lora(file, loaded("sd1"))
    sentence = str(caught.value)
    assert type(caught.value) is kind
    assert sentence.startswith(str(file))
    assert sentence.endswith(".")
    assert not re.search(r"[.!?] [A-Z]|\n", sentence.removeprefix(str(file)))


def test_partial_takes_what_fits(loaded: Any, tmp_path: Path) -> None:
    for name in ("half a layer", "an unknown layer", "another shape", "a stray tensor", "an alpha alone"):
        lora = load_lora(write(tmp_path / "a.safetensors", BAD[name][0]), loaded("sd1"), partial=True)
        assert names(lora) == {f"unet.{QUERY}"}
        assert len(lora.report.unmatched) == 1
    for name in ("SDXL", "a doubled prefix", "OFT"):  # of which nothing fits
        with pytest.raises(BAD[name][1]):
            load_lora(write(tmp_path / "a.safetensors", BAD[name][0]), loaded("sd1"), partial=True)


def test_a_wrong_family_is_refused_although_the_shapes_fit(loaded: Any, tmp_path: Path) -> None:
    """SD 1.x and 2.x differ in the text that they look at, and little else."""
    file = write(tmp_path / "a.safetensors", one(), ss_base_model_version="sd_v2")
    with pytest.raises(MismatchError, match=r"a LoRA for Stable Diffusion 2.x and not made for .*; partial=True loads"):
        load_lora(file, loaded("sd1"))
    assert names(load_lora(file, loaded("sd1"), partial=True)) == {f"unet.{QUERY}"}
    text = [layer for layer in draw(loaded("sd1"), "self_attn") if layer.component == "text_encoder"]
    file = write(tmp_path / "b.safetensors", kohya(text), ss_base_model_version="sdxl_base")
    assert len(names(load_lora(file, loaded("sd1")))) == len(text), "the first encoder of SDXL is that of SD 1.x"


def test_what_a_file_says_is_no_instruction(loaded: Any, tmp_path: Path) -> None:
    """Metadata of the wrong kind is passed over, or refused."""
    tensors = {"unet:0:down": some(2, 32), "unet:0:up": some(32, 2)}
    for said in ("{", "[3]", '"GEGLU"', '["No such class"]'):
        assert load_lora(write(tmp_path / "a.safetensors", tensors, unet=said), loaded("sd1"), partial=True).layers
    tensors = peft(draw(loaded("sd1")))
    for said in ("{", "3", '{"lora_alpha": "many"}', '{"alpha_pattern": 3}'):
        with pytest.raises(FileError, match="damaged"):
            load_lora(write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=said), loaded("sd1"))
