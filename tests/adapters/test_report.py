"""The report says what a file holds and what fits, and `sfumato inspect` says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import sfumato
from sfumato.adapters.lora_file import load_lora
from sfumato.adapters.report import SHOWN, Matched, Report, Unmatched
from sfumato.io.family import Family

from loras import draw, kohya, write

SPELLED = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_"
PATH = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_"


def layer(name: str, rank: int, alpha: float | None = None, width: int = 320) -> dict[str, np.ndarray]:
    found = {"lora_down.weight": np.ones((rank, width)), "lora_up.weight": np.ones((width, rank))}
    found |= {} if alpha is None else {"alpha": np.asarray(alpha)}
    return {f"lora_unet_{SPELLED}{name}.{part}": array.astype(np.float32) for part, array in found.items()}


def test_the_facts(tmp_path: Path) -> None:
    tensors = layer("q", 4, 2) | layer("k", 8, 2) | layer("v", 8) | layer("out_0", 8) | layer("quux", 4)
    tensors |= {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{part}": np.ones(shape, np.float32)
                for part, shape in {"diff": (3072, 768), "diff_b": (3072,)}.items()}  # fmt: skip
    file = write(tmp_path / "a.safetensors", tensors)
    report = load_lora(file, partial=True).report
    assert (report.path, report.format, report.variant) == (file, "kohya", "LoRA + full difference")
    assert report.ranks == {8: 3, 4: 1, None: 1}
    assert report.scales == {(None, 8, 1.0): 2, (2, 4, 0.5): 1, (2, 8, 0.25): 1, (None, None, 1.0): 1}
    by_path = {each.path: each for each in report.matched}
    assert by_path[f"{PATH}q"] == Matched(f"lora_unet_{SPELLED}q", "unet", f"{PATH}q", 4, 2.0, 0.5)
    (lost,) = report.unmatched
    assert (lost.name, lost.why) == (f"lora_unet_{SPELLED}quux", "there is no such layer")
    assert str(lost.nearest).startswith(f"unet.{PATH}")
    assert report.rows() == {
        "format": "kohya", "variant": "LoRA + full difference", "rank": "4 to 8",
        "alphas": "no alpha, rank 8 (x 1): 2 layers; alpha 2, rank 4 (x 0.5): 1 layers; alpha 2, rank 8 (x 0.25): "
                  "1 layers; no alpha, no rank (x 1): 1 layers",
        "matched": f"5 of 6 layers in {report.target}: text_encoder 1, unet 4",
        "unmatched": f"{lost.name} (there is no such layer, the nearest is {lost.nearest})",
    }  # fmt: skip


def test_in_print(loaded: Any, tmp_path: Path) -> None:
    """A few lines, whatever there is in the file."""
    layers = draw(loaded("sd1"))
    odd = {f"lora_unet_odd_{i}\n.diff": np.ones((3, 3), np.float32) for i in range(50)}
    report = load_lora(write(tmp_path / "a.safetensors", kohya(layers) | odd), loaded("sd1"), partial=True).report
    lines = str(report).splitlines()
    assert lines[:2] == [str(report.path), "  lora"]
    assert len(lines) < 10
    assert f"{len(layers)} of {len(layers) + 50} layers in" in str(report)
    assert str(report).endswith(f"and {50 - SHOWN} more")
    assert "odd_0\\n (there is no such layer" in str(report)


def test_reports_are_values(loaded: Any, tmp_path: Path) -> None:
    """A LoRA that is loaded again compiles nothing again, where a report is part of a pytree's structure."""
    file = write(tmp_path / "a.safetensors", kohya(draw(loaded("sd1"), alpha=1.0)))
    first, second = (load_lora(file, loaded("sd1")).report for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)


def test_nothing_matched() -> None:
    report = Report(Path("a"), "kohya", None, "LoRA", (), (Unmatched("x", "there is no such layer"),))
    assert report.rows()["rank"] == "full"
    assert report.problem() == "none of its layers (1) can be used in the model, first x (there is no such layer)"
    assert str(report).splitlines()[1] == "  lora"


def test_inspect_says_the_same(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.safetensors", layer("q", 4, 2) | layer("quux", 4) | {"bundle_emb.cat.clip_l": np.ones(3)}
    )
    ours, theirs = load_lora(file, partial=True).report, sfumato.inspect(file)
    assert ours.rows().items() <= theirs.details.items()
    assert theirs.details["embedded tokens"] == "cat"
    assert (theirs.kind, theirs.family, theirs.problem) == ("lora", None, ours.problem())
    assert all(value in str(theirs) for value in ours.rows().values())
    good = sfumato.inspect(write(tmp_path / "b.safetensors", layer("q", 4, 2)))
    assert (good.problem, good.details["matched"]) == (None, f"1 of 1 layers in {ours.target}: unet 1")
    assert ours.target == "Stable Diffusion 1.x and Stable Diffusion 2.x"


def test_inspect_of_a_broken_lora(tmp_path: Path) -> None:
    doubled = {key.replace("lora_unet", "lora_unet_unet"): value for key, value in layer("q", 4).items()}
    report = sfumato.inspect(write(tmp_path / "a.safetensors", doubled))
    assert "put before them twice" in str(report.problem)
    flux = {"lora_unet_double_blocks_0_img_attn_qkv.diff": np.ones((3, 3), np.float32)}
    report = sfumato.inspect(write(tmp_path / "b.safetensors", flux))
    assert "made for FLUX" in str(report.problem)
    assert "matched" not in report.details
    xl = {key.replace(SPELLED, "mid_block_attentions_0_transformer_blocks_9_attn1_to_"): value
          for key, value in layer("q", 4, width=1280).items()}  # fmt: skip
    assert sfumato.inspect(write(tmp_path / "c.safetensors", xl)).family is Family.SDXL
    settings = write(tmp_path / "d.safetensors", layer("q", 4), lora_adapter_metadata="{")
    assert "damaged metadata" in str(sfumato.inspect(settings).problem)
