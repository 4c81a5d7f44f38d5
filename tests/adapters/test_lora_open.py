"""Where a LoRA's tensors and PEFT's settings are found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfumato.adapters.lora_file import load_lora
from sfumato.adapters.lora_open import open_lora, scaling, settings
from sfumato.errors import FileError
from sfumato.io.tensors import open_tensors

from loras import draw, kohya, peft, write


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    shapes = {"lora_A": (2, 32), "lora_B": (32, 2)}
    path = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{path}.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("names", [
    ("pytorch_lora_weights.safetensors", "other.safetensors"), ("adapter_model.safetensors", "optimizer.bin"),
    ("my style.safetensors",), ("style.safetensors", "style.bin", "README.md"),
])  # fmt: skip
def test_folders(names: tuple[str, ...], tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    """By the usual name, or the only one there is; the safe container first."""
    for name in names[1:]:
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path / names[0], tensors)
    file, configs = open_lora(tmp_path)
    assert (file.path.name, configs) == (names[0], {})


def test_folders_without_a_choice(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"holds no LoRA: there is no file of weights in it\.$"):
        open_lora(tmp_path)
    for name in "abcde":
        write(tmp_path / f"{name}.safetensors", tensors)
    with pytest.raises(FileError, match=r"holds 5 files of weights, so name one of them: a.safetensors, .* and 2 more"):
        open_lora(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        open_lora(tmp_path / "f.safetensors")


def test_settings_beside_a_file(tensors: dict[str, np.ndarray], tmp_path: Path, loaded: Any) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    file = write(tmp_path / "adapter_model.safetensors", tensors)
    for source in (tmp_path, file):
        ((_, delta),) = load_lora(source, loaded("sd1")).layers["unet"].items()
        assert float(delta.scale) == 3  # type: ignore[attr-defined]
    assert settings(open_tensors(write(tmp_path / "other.safetensors", tensors))) == {}
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(FileError, match=r"adapter_config\.json is damaged"):
        load_lora(file, loaded("sd1"))


def test_settings_inside(tensors: dict[str, np.ndarray], tmp_path: Path) -> None:
    told = {"unet.r": 2, "unet.lora_alpha": 6, "text_encoder.r": 4, "r": 3, "a.b": 1}
    file = open_tensors(write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=told))
    assert settings(file) == {"unet": {"r": 2, "lora_alpha": 6}, "text_encoder": {"r": 4}, "": {"r": 3, "a.b": 1}}


def test_a_folder_for_each_component(tmp_path: Path, loaded: Any) -> None:
    """As PEFT saves the networks of a pipeline, each with its own settings."""
    layers = draw(loaded("sdxl"), ranks=(2,))
    for number, component in enumerate(("unet", "text_encoder", "text_encoder_2")):
        folder = tmp_path / component
        folder.mkdir()
        own = [layer for layer in layers if layer.component == component]
        write(folder / "adapter_model.safetensors", peft(own, "base_model.model."))
        (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2 * number + 2}))
    lora = load_lora(tmp_path, loaded("sdxl"))
    assert len(lora.report.matched) == len(layers)
    scales = [{float(delta.scale) for delta in deltas.values()} for deltas in lora.layers.values()]  # type: ignore[attr-defined]
    assert dict(zip(lora.layers, scales, strict=True)) == {"unet": {1}, "text_encoder": {2}, "text_encoder_2": {3}}
    for layer in layers:
        assert np.array_equal(lora.layers[layer.component][layer.path].down, layer.down)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("config", "alpha", "rank", "wanted"), [
    ({}, None, 4, (None, 1.0)),
    ({}, 2.0, 4, (2.0, 0.5)),
    ({}, 2.0, None, (2.0, 1.0)),
    ({"lora_alpha": 8, "r": 4}, None, 4, (8.0, 2.0)),
    ({"lora_alpha": 8, "r": 4}, 2.0, 4, (2.0, 0.5)),
    ({"lora_alpha": 8, "r": 4, "use_rslora": True}, None, 4, (8.0, 4.0)),
    ({"lora_alpha": 8, "alpha_pattern": {"attn1.to_q": 4}}, None, 4, (4.0, 1.0)),
    ({"lora_alpha": 8, "alpha_pattern": {r".*attn\d.to_q": 4}}, None, 4, (4.0, 1.0)),
    ({"lora_alpha": 8, "alpha_pattern": {"^mid_block.attn1.to_q": 4}}, None, 4, (4.0, 1.0)),
    ({"lora_alpha": 8, "alpha_pattern": {"ttn1.to_q": 4, "to": 4, "attn1": 4, "(": 4}}, None, 4, (8.0, 2.0)),
    ({"alpha": 8, "r": 2}, None, None, (8.0, 4.0)),  # LoKr of PEFT's
])  # fmt: skip
def test_scaling(config: dict[str, Any], alpha: float | None, rank: int | None, wanted: tuple) -> None:
    assert scaling(config, "mid_block.attn1.to_q", alpha, rank) == wanted


def test_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: Any) -> None:
    """The weights are chosen among a repository's files, and the settings come along."""
    asked = []
    layers = draw(loaded("sd1"))
    write(tmp_path / "pytorch_lora_weights.safetensors", kohya(layers))
    monkeypatch.setattr("sfumato.io.hub._listing", lambda name, revision: ["a.md", "pytorch_lora_weights.safetensors"])
    monkeypatch.setattr(
        "sfumato.io.hub._download", lambda name, patterns, *rest, **more: asked.append(patterns) or tmp_path
    )
    assert len(load_lora("somebody/style", loaded("sd1")).report.matched) == len(layers)
    assert {"pytorch_lora_weights.safetensors", "adapter_config.json"} <= set(asked[0])
