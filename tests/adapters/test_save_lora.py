"""What is written is read back, by us and by the reference, with the same effect."""

from __future__ import annotations

import dataclasses as dc
import errno
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from sfumato.adapters.delta import Delta, Full, LoHa, LoKr, LowRank
from sfumato.adapters.lora import Lora
from sfumato.adapters.lora_file import load_lora
from sfumato.adapters.save_lora import FOLDER_NAME, save_lora, scaled
from sfumato.errors import SfumatoError
from sfumato.models.unet import UNet

import loras
from loras import ATTENTION, BLOCK, CONV, EVERYWHERE, NORM, QUERY, Layer, draw, some
from oracle import fresh


def lora_of(layers: list[Layer], dtype: Any = np.float32) -> Lora:
    found: dict[str, dict[str, Delta]] = {}
    for layer in layers:
        scale = 1.0 if layer.alpha is None else layer.alpha / len(layer.down)
        delta = LowRank(layer.down.astype(dtype), layer.up.astype(dtype), None, scale, layer.magnitude)
        found.setdefault(layer.component, {})[layer.path] = delta
    return Lora(found)


def keys(file: Path) -> set[str]:
    with safe_open(file, "numpy") as opened:
        return set(opened.keys())


def assert_same(first: Lora, second: Lora) -> None:
    """The same layers with the same effect, to the rounding of one product."""
    assert {c: set(deltas) for c, deltas in first.layers.items()} == {c: set(d) for c, d in second.layers.items()}
    for component, deltas in first.layers.items():
        for path, delta in deltas.items():
            other = second.layers[component][path]
            weights = [np.asarray(each.weight()) for each in (delta, other)]
            assert weights[0].size == weights[1].size
            np.testing.assert_allclose(weights[0].ravel(), weights[1].ravel(), atol=1e-5, rtol=1e-5)
            if delta.magnitude is not None:
                assert other.magnitude is not None
                assert np.array_equal(np.ravel(delta.magnitude), np.ravel(other.magnitude))


def mixed(model: Any, target: str, seed: int = 0) -> list[Layer]:
    """Layers of different ranks and alphas."""
    layers = draw(model, target, ranks=(2, 4), seed=seed)
    return [dc.replace(layer, alpha=float(1 + i % 3)) for i, layer in enumerate(layers)]


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("format", "kind"), [
    ("kohya", "sd1"), ("kohya", "sdxl-layers"), ("diffusers", "sd1"), ("diffusers", "sdxl")])  # fmt: skip
def test_the_reference_reads_what_is_written(
    format: str, kind: str, saved: Any, loaded: Any, tmp_path: Path
) -> None:  # fmt: skip
    """Also where alphas differ, which the reference would mix up."""
    layers = mixed(loaded(kind), EVERYWHERE if kind.startswith("sdxl") else EVERYWHERE.replace("|add_embedding", ""))
    file = save_lora(lora_of(layers), tmp_path / "a.safetensors", format)
    pipeline = saved(kind)[1]
    before, after = loras.weights(pipeline), loras.fused(pipeline, file)
    differ = {name for name in before if not np.array_equal(before[name], after[name])}
    assert differ == {f"{layer.component}.{layer.path}" for layer in layers}
    for layer in layers:
        name = f"{layer.component}.{layer.path}"
        np.testing.assert_allclose(after[name] - before[name], layer.change, atol=1e-5, rtol=1e-5)


@pytest.mark.parity
@pytest.mark.slow
def test_the_reference_reads_dora(saved: Any, loaded: Any, tmp_path: Path) -> None:
    layers = draw(loaded("sd1"), r"\.attn1\.to_[qk]$|self_attn|conv1", dora=True, alpha=2.0)
    file = save_lora(lora_of(layers), tmp_path / "a.safetensors", "diffusers")
    pipeline = saved("sd1")[1]
    before, after = loras.weights(pipeline), loras.fused(pipeline, file)
    for layer in layers:
        wanted = before[f"{layer.component}.{layer.path}"] + layer.change
        columns = tuple(range(1, wanted.ndim))
        assert layer.magnitude is not None
        wanted *= layer.magnitude.reshape(-1, *[1] * len(columns)) / np.sqrt((wanted**2).sum(columns, keepdims=True))
        np.testing.assert_allclose(after[f"{layer.component}.{layer.path}"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sdxl", "sdxl-refiner"])
def test_round_trip(format: str, kind: str, loaded: Any, tmp_path: Path) -> None:
    # kohya's names of SDXL's layers count two to a level, which the tiny pipelines do not have.
    model = loaded(kind)
    model = dc.replace(model, unet=fresh(UNet, dc.replace(model.unet.config, layers_per_block=2)))
    for number, layers in enumerate((mixed(model, ATTENTION), draw(model, "conv1|self_attn", dora=True))):
        lora = lora_of(layers)
        again = load_lora(save_lora(lora, tmp_path / f"{number}.safetensors", format), model)
        assert_same(lora, again)
        twice = load_lora(save_lora(again, tmp_path / f"{number}.safetensors", format, overwrite=True), model)
        assert_same(again, twice)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_equal_alphas_keep_every_number(dtype: Any, loaded: Any, tmp_path: Path) -> None:
    lora = lora_of(draw(loaded("sd1"), alpha=3.0, ranks=(2, 4, 3)), dtype)
    again = load_lora(save_lora(lora, tmp_path / "a.safetensors"), loaded("sd1"))
    for component, deltas in lora.layers.items():
        for path, delta in deltas.items():
            other: Any = again.layers[component][path]
            assert isinstance(delta, LowRank)
            assert other.down.dtype == other.up.dtype == dtype
            assert np.array_equal(other.down, delta.down)
            assert np.array_equal(other.up, delta.up)
            assert float(other.scale) == np.float32(delta.scale)
    assert {alpha for alpha, *_ in again.report.scales} == {3.0}


def test_scales_of_one_need_no_alphas(loaded: Any, tmp_path: Path) -> None:
    lora = lora_of(draw(loaded("sd1"), ranks=(2, 4)))
    file = save_lora(lora, tmp_path / "a.safetensors")
    assert not any(key.endswith("alpha") for key in keys(file))
    again: Any = load_lora(file, loaded("sd1")).layers["unet"][QUERY]
    assert np.array_equal(again.up, lora.layers["unet"][QUERY].up)  # type: ignore[attr-defined]


def relatives() -> dict[str, Delta]:
    magnitude = abs(some(32)) + 1
    return {
        QUERY: LoHa(some(32, 2), some(2, 32), some(32, 2), some(2, 32), scale=0.5),
        f"{BLOCK}.attn1.to_k": LoKr(w1=some(4, 4), w2=some(8, 8), scale=0.5),
        f"{BLOCK}.attn1.to_v": LoKr(w1=some(4, 4), w2_a=some(8, 2), w2_b=some(2, 8), scale=2.0),
        CONV: LowRank(some(2, 32, 1, 1), some(32, 2, 1, 1), some(2, 2, 3, 3), 0.5, magnitude),
        NORM: Full(some(32), some(32)),
        "down_blocks.0.resnets.0.conv2": Full(bias=some(32)),
        f"{BLOCK}.attn2.to_q": LowRank(some(2, 32), some(32, 2), scale=0.25, magnitude=abs(some(1, 32)) + 1),
    }


def test_kohya_holds_everything(loaded: Any, tmp_path: Path) -> None:
    lora = Lora({"unet": relatives()})
    again = load_lora(save_lora(lora, tmp_path / "a.safetensors"), loaded("sd1"))
    assert_same(lora, again)
    for path, delta in lora.layers["unet"].items():
        other = again.layers["unet"][path]
        assert type(other) is type(delta)
        if delta.bias is not None:
            assert other.bias is not None
            assert np.array_equal(delta.bias, other.bias)
        if isinstance(delta.magnitude, np.ndarray):  # by inputs or by outputs, as it was
            first = delta.magnitude if delta.magnitude.ndim > 1 else delta.magnitude.reshape(-1, 1, 1, 1)
            assert other.magnitude is not None
            assert other.magnitude.shape == first.shape


def test_diffusers_gets_what_it_has(loaded: Any, tmp_path: Path) -> None:
    """The Tucker form becomes LoCon of the same rank; other relatives are refused."""
    all_of_them = relatives()
    lora = Lora({"unet": {CONV: all_of_them.pop(CONV)}})
    again = load_lora(save_lora(lora, tmp_path / "a.safetensors", "diffusers"), loaded("sd1"))
    assert_same(lora, again)
    assert again.layers["unet"][CONV].rank == 2
    for path, delta in all_of_them.items():
        with pytest.raises(SfumatoError, match=r"The diffusers format has no .* in the format kohya\.$"):
            save_lora(Lora({"unet": {path: delta}}), tmp_path / "b.safetensors", "diffusers")
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_names_of_sdxl(loaded: Any, tmp_path: Path) -> None:
    """In the original numbering, and with a number for the first text encoder."""
    layers = draw(loaded("sdxl"), r"attn1\.to_q|layers\.0\.self_attn\.q_proj|upsamplers")
    stems = {key.split(".")[0] for key in keys(save_lora(lora_of(layers), tmp_path / "a.safetensors"))}
    assert {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", "lora_unet_output_blocks_2_2_conv",
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"} <= stems  # fmt: skip
    layers = [layer for layer in draw(loaded("sd1"), r"attn1\.to_q") if layer.component == "unet"]
    file = save_lora(lora_of(layers), tmp_path / "b.safetensors")
    assert f"lora_unet_{QUERY.replace('.', '_')}.lora_down.weight" in keys(file)


def test_what_the_metadata_says(loaded: Any, tmp_path: Path) -> None:
    """The family, for a file whose shapes do not tell it."""
    model = loaded("sdxl-layers")
    layers = draw(model, "mid_block.attentions.0.transformer_blocks.1.attn1.to_q")
    file = save_lora(lora_of(layers), tmp_path / "a.safetensors")
    with safe_open(file, "numpy") as opened:
        assert opened.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    report = load_lora(save_lora(load_lora(file, model), tmp_path / "b.safetensors"), model).report
    assert report.family == "sdxl"


def test_where_it_is_written(loaded: Any, tmp_path: Path) -> None:
    lora = lora_of(draw(loaded("sd1"), "conv_in"))
    assert save_lora(lora, tmp_path) == tmp_path / FOLDER_NAME
    assert save_lora(lora, tmp_path / "new folder" / "a.safetensors").exists()
    with pytest.raises(SfumatoError, match=r"is there already; name another file or say overwrite=True\.$"):
        save_lora(lora, tmp_path)
    with pytest.raises(SfumatoError, match=r"written as .safetensors, and .*a\.pt is neither that nor a folder\.$"):
        save_lora(lora, tmp_path / "a.pt")
    with pytest.raises(SfumatoError, match=r"Unknown format 'PEFT' for a LoRA; there are kohya and diffusers\.$"):
        save_lora(lora, tmp_path / "b.safetensors", "PEFT")
    with pytest.raises(SfumatoError, match=r"has no layers, so there is nothing to write\.$"):
        save_lora(Lora({"unet": {}}), tmp_path / "b.safetensors")


def test_no_half_files(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = lora_of(draw(loaded("sd1"), "conv_in"))
    file = save_lora(lora, tmp_path / "a.safetensors")
    before = file.read_bytes()

    def fail(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)  # all is written by then, and nothing in its place
    with pytest.raises(SfumatoError, match=r"a\.safetensors cannot be written \(No space left on device\)"):
        save_lora(lora, file, overwrite=True)
    assert (file.read_bytes(), list(tmp_path.iterdir())) == (before, [file])


def test_scaling_keeps_the_type_where_it_is_exact() -> None:
    array = np.asarray([1.0, 3.0], np.float16)
    assert scaled(array, 1.0) is array
    assert scaled(array, 0.25).dtype == np.float16
    assert scaled(array, 1 / 3).dtype == np.float32
    np.testing.assert_allclose(scaled(array, 1 / 3), [1 / 3, 1], rtol=1e-6)


def test_arrays_of_jax_are_written_too(loaded: Any, tmp_path: Path) -> None:
    lora = jax.tree.map(jax.numpy.asarray, lora_of(draw(loaded("sd1"), "conv_in", alpha=2.0)))
    assert_same(lora, load_lora(save_lora(lora, tmp_path / "a.safetensors"), loaded("sd1")))
