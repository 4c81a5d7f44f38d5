"""The stages that train what comes with the package."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from typer.testing import CliRunner

from sfumato import cli
from sfumato.embedded import PIECES
from tools.art.metadata import METADATA, enlist, listed
from tools.embedded import examples
from tools.embedded.pack import stage
from tools.embedded.stages import SIZES, STAGES

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("scale", SIZES)
def test_every_training_is_a_command_that_sfumato_takes(scale, monkeypatch):
    seen = []

    def note(settings):
        seen.append(settings)
        return SimpleNamespace(stopped=False, final="out/final")

    monkeypatch.setattr("sfumato.train.job.run", note)
    runs = Path("some folder")
    for each in STAGES:
        words = each.command(runs, scale)
        if words[:2] == ["sfumato", "train"]:
            assert CliRunner().invoke(cli.app, words[1:]).exception is None, words
            assert Path(seen[-1].run.out) / "final" == runs / each.done
    assert len(seen) >= 3


def test_what_a_stage_starts_from_is_made_before():
    made = set()
    for each in STAGES:
        needed = {word.split("/")[1] for word in each.command(Path("RUNS"), "small") if word.startswith("RUNS/")}
        assert needed - {each.name, "packages"} <= made, each.name
        made.add(each.name)
    assert {stage(piece) for piece in PIECES} <= made


def test_the_commands_are_printed():
    command = [sys.executable, "-m", "tools.embedded", "RUNS", "--print", "--only", "base", "lines"]
    lines = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.splitlines()
    assert [shlex.split(line)[:3] for line in lines] == [
        ["sfumato", "train", "text-to-image"], ["sfumato", "train", "controlnet"],
    ]  # fmt: skip


def test_the_examples_call_what_is_taught_by_its_new_name(tmp_path):
    art, words, subject = (tmp_path / name for name in ("art", "word", "subject"))
    for folder in (art, words, subject):
        folder.mkdir()
    lines = []
    for concept, style in ((examples.CONCEPT, "noto"), (examples.CONCEPT, "fluent-flat"), ("red heart", "noto")):
        name = f"{len(lines)}.webp"
        Image.new("RGB", (128, 128), "blue").save(art / name)
        lines.append({"file_name": name, "text": [f"a {concept}, {style}"], "concept": concept, "style": style})
    enlist(art / METADATA, lines)
    examples.word(art, words)
    assert said(words) == [["a <blue-heart>, noto"]]
    examples.subject(subject)
    assert set(said(subject)) == {"a sks cat face"}
    pictures = {Image.open(path).convert("RGB").tobytes() for path in subject.glob("*.png")}
    assert len(pictures) == len(said(subject)) >= 5
    assert {Image.open(path).size for path in subject.glob("*.png")} == {(128, 128)}


def said(folder):
    """The texts of a folder's pictures, which are there."""
    lines = listed(folder)
    assert all((folder / line["file_name"]).is_file() for line in lines)
    return [line["text"] for line in lines]
