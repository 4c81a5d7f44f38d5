"""What single files leave unsaid: the prediction type, by every witness that there is."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.io.lazy import LazyTensor
from sfumato.io.single_file import read_single_file

from published import checkpoint, file_of, stub

WITNESS = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
V, EPS = "v_prediction", "epsilon"


@pytest.mark.parametrize(("name", "metadata", "more", "expected"), [
    ("sd1", {}, {}, EPS),
    ("sd1", {"modelspec.prediction_type": "v"}, {}, V),
    ("sd2", {}, {WITNESS: 0.2}, V),
    ("sd2", {}, {WITNESS: 0.05}, EPS),
    ("sd2", {"modelspec.prediction_type": "epsilon"}, {WITNESS: 0.2}, EPS),
    ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, {}, V),
    ("sd2", {"global_step": "875000"}, {WITNESS: 0.2}, EPS),
    ("sd2-depth", {}, {WITNESS: 0.2}, EPS),
    ("sdxl", {}, {}, EPS),
    ("sdxl", {}, {"v_pred": 0}, V),
    ("sdxl", {"modelspec.predict_key": "v"}, {}, V),
    ("sdxl-refiner", {}, {}, EPS),
])  # fmt: skip
def test_prediction_type(name, metadata, more, expected):
    tensors = checkpoint(name)
    for key, spread in more.items():
        tensors[key] = LazyTensor.of(np.resize(np.float16([-spread, spread]), 320))
    config = read_single_file(file_of(tensors, **metadata)).configs
    assert config["scheduler"]["prediction_type"] == expected
    if name == "sd2":
        assert config["unet"]["sample_size"] == (96 if expected == V else 64)
    for told in (V, EPS):
        parts = read_single_file(file_of(tensors, **metadata), prediction_type=told)
        assert parts.configs["scheduler"]["prediction_type"] == told


def test_zero_terminal_snr_is_marked():
    plain = read_single_file(file_of(checkpoint("sdxl") | {"v_pred": stub((0,))})).configs["scheduler"]
    marked = read_single_file(file_of(checkpoint("sdxl") | {"v_pred": stub((0,)), "ztsnr": stub((0,))}))
    scheduler = marked.configs["scheduler"]
    assert "rescale_betas_zero_snr" not in plain
    assert (scheduler["rescale_betas_zero_snr"], scheduler["timestep_spacing"]) == (True, "trailing")
    assert not any("ztsnr" in part or "v_pred" in part for part in marked.tensors.values())


def test_the_original_configuration_beside_the_file_decides(tmp_path):
    tensors = checkpoint("sd2")
    for text, expected in (('unet_config: {}\nparameterization: "v"', V), ("unet_config: {}", EPS), ("lr: 1", V)):
        (tmp_path / "model.yaml").write_text(text)
        file = file_of(tensors | {"v_pred": stub((0,))}, str(tmp_path / "model.safetensors"))
        assert read_single_file(file).configs["scheduler"]["prediction_type"] == expected


def test_unknown_prediction_type():
    with pytest.raises(SfumatoError, match="prediction type 'noise'"):
        read_single_file(file_of(checkpoint("sd1")), prediction_type="noise")
