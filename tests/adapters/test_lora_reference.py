"""Whole runs with LoRAs against the reference, with the same file and strength."""

from __future__ import annotations

import copy
import dataclasses as dc
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.adapters.lora_file import load_lora

import loras
from runs import Pair

pytestmark = [pytest.mark.slow, pytest.mark.parity]


def theirs(both: Pair, files: Sequence[Path], strengths: Sequence[Any]) -> np.ndarray:
    """The latents of the reference with files at strengths of their own; its pipeline stays as it was."""
    parts = {name: copy.deepcopy(part) if hasattr(part, "parameters") else part
             for name, part in both.pipeline.components.items()}  # fmt: skip
    other = type(both.pipeline)(**parts)
    other.set_progress_bar_config(disable=True)
    names = [f"number{number}" for number in range(len(files))]
    for name, file in zip(names, files, strict=True):
        other.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=name)
    other.set_adapters(names, list(strengths))
    return dc.replace(both, pipeline=other).theirs()


NO_CLASS = loras.EVERYWHERE.replace("|add_embedding", "")
FILES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "kohya": (NO_CLASS, loras.kohya, {"alpha": 2.0}),
    "kohya without alphas": (loras.ATTENTION, loras.kohya, {}),
    "diffusers (old)": (loras.ATTENTION, loras.diffusers_old, {}),
    "diffusers": (loras.ATTENTION, loras.diffusers_new, {}),
    "PEFT names": (loras.EVERYWHERE, loras.peft, {}),
    "PEFT names, DoRA": (loras.EVERYWHERE, loras.peft, {"dora": True}),
}
"""By name: the layers that are changed, who writes the file, and what it holds."""


@pytest.fixture(scope="module")
def plain(pair) -> Any:
    return functools.cache(lambda kind: pair(kind).ours())


def assert_like_the_reference(
    both: Pair, without: np.ndarray, layers: Any, tensors: Any, file: Path, live: bool
) -> None:
    loras.write(file, tensors)
    lora = load_lora(file, both.model)
    assert len(lora.report.matched) == len(layers)
    for strength in (1.0, 0.6):
        want = theirs(both, [file], [strength])
        assert np.abs(want - without).max() > 0.05, "the file changes nothing"
        both.assert_same(dc.replace(both, model=lora.apply(both.model, strength)).ours(), want)
        if live:
            both.assert_same(dc.replace(both, model=lora.apply(both.model, strength, live=True)).ours(), want)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("name", FILES)
def test_latents_are_those_of_the_reference(name, kind, pair, plain, tmp_path):
    """At two strengths, merged, and live for the files that change the most layers.

    With the text encoders, but for DoRA: the reference does not find the magnitudes there and draws others. Those of
    kohya's files it leaves out.
    """
    target, write, settings = FILES[name]
    layers = loras.draw(pair(kind).model, target, ranks=(4, 2), **settings)
    if settings.get("dora"):
        layers = [layer for layer in layers if layer.component == "unet"]
    live = target is not loras.ATTENTION
    assert_like_the_reference(pair(kind), plain(kind), layers, write(layers), tmp_path / "a.safetensors", live)


def test_latents_of_sdxl_in_its_original_numbers(pair, plain, tmp_path):
    both = pair("sdxl")
    layers = loras.draw(both.model, NO_CLASS, ranks=(4, 2), alpha=2.0)
    tensors = loras.kohya(layers, loras.original(both.model))
    assert any("input_blocks" in key for key in tensors)
    assert_like_the_reference(both, plain("sdxl"), layers, tensors, tmp_path / "a.safetensors", live=False)


def test_two_files_with_strengths_of_their_own(pair, tmp_path):
    both = pair("sd1")
    files = [
        loras.write(tmp_path / f"{seed}.safetensors", loras.peft(loras.draw(both.model, seed=seed))) for seed in (0, 1)
    ]
    model, strengths = both.model, ((0.7, 0.2), (0.4, 1.1))
    for file, (unet, text) in zip(files, strengths, strict=True):
        model = load_lora(file, both.model).apply(model, unet=unet, text=text)
    want = theirs(both, files, [{"unet": unet, "text_encoder": text} for unet, text in strengths])
    both.assert_same(dc.replace(both, model=model).ours(), want)
