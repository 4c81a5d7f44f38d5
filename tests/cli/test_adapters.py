"""--lora and --embedding."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from cli.test_cli import run
from sfumato import SfumatoError
from sfumato.cli.adapters import parse_lora
from sfumato.io.picture_metadata import read_metadata

from loras import draw, kohya, write


@pytest.mark.parametrize(("text", "file", "strength"), [
    ("style.safetensors", "style.safetensors", 1.0),
    ("style.safetensors:0.8", "style.safetensors", 0.8),
    ("a:b/style.pt:-1", "a:b/style.pt", -1.0),
    ("C:\\loras\\style.safetensors", "C:\\loras\\style.safetensors", 1.0),
    ("owner/name:2", "owner/name", 2.0),
])  # fmt: skip
def test_file_and_strength(text, file, strength):
    assert parse_lora(text) == (file, strength)


@pytest.mark.parametrize(("text", "words"), [
    ("style.safetensors:strong", "The strength of --lora style.safetensors must be a number, not 'strong'"),
    ("style.safetensors:nan", "must be a finite number"),
    (":0.5", "takes FILE"),
])  # fmt: skip
def test_no_strength(text, words):
    with pytest.raises(SfumatoError, match=words):
        parse_lora(text)


@pytest.mark.slow
def test_a_style_and_a_word(saved, loaded, tmp_path):
    lora = write(tmp_path / "style.safetensors", kohya(draw(loaded("sd1-small"))))
    word = tmp_path / "stripes.safetensors"
    save_file({"<stripes>": np.random.default_rng(0).standard_normal((2, 24)).astype(np.float32)}, word)

    def made(*arguments: str) -> tuple[bytes, dict]:
        done = run(
            "generate", "a <stripes> fox", "-m", str(saved("sd1-small")[0]), "-o", str(tmp_path / "fox.png"), "--json",
            "--size", "16x16", "--steps", "2", *arguments,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
        return (tmp_path / "fox.png").read_bytes(), read_metadata(tmp_path / "fox.png") or {}

    plain, facts = made()
    assert "adapters" not in facts
    changed, facts = made("--lora", f"{lora}:0.5", "--embedding", f"{word}=<lines>")
    assert facts["adapters"] == ["style.safetensors (0.5)", "word <lines> (1)"]
    other, _ = made("--lora", f"{lora}:0.5", "--embedding", str(word))
    assert len({plain, changed, other}) == 3
