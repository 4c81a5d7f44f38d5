"""`sfumato train`: flags, files, mistakes, and every recipe by its command."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from typer.testing import CliRunner

import sfumato
from sfumato import cli
from sfumato.train.groups import PANELS
from sfumato.train.own import RECIPES, Lora
from sfumato.train.settings import Settings, flags
from train import jobs


def run(*words: str):
    """`sfumato train` with these words, in this process."""
    return CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(cli.app, ["train", *map(str, words)])


def ended(capsys, *words: str) -> tuple[int, str]:
    """The exit status and what stands on standard error."""
    with mock.patch.object(sys, "argv", ["sfumato", "train", *map(str, words)]), pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code, capsys.readouterr().err


@pytest.fixture
def seen():
    """The settings of runs that are not run."""
    found: list[Settings] = []

    def note(settings):
        found.append(settings)
        return SimpleNamespace(stopped=False, final="out/final")

    with mock.patch("sfumato.train.job.run", note):
        yield found


def test_help_lists_the_recipes():
    out = run("--help").output
    assert all(name in out for name in RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_groups_its_flags(name):
    out = run(name, "--help").output
    known = list(flags(RECIPES[name]))
    assert all(re.search(rf" {flag.name}[ ,]", out) for flag in known)
    panels = [PANELS[group] for group in PANELS if any(flag.group == group for flag in known)]
    places = [out.index(f"─ {panel} ─") for panel in panels]
    assert places == sorted(places)


@pytest.mark.parametrize("name", RECIPES)
def test_a_command_line_says_all_settings(name, seen):
    for settings in (jobs.changed(RECIPES[name]), jobs.changed(RECIPES[name]).with_flags({"run__seed": 0})):
        done = run(*shlex.split(settings.command())[2:])
        assert done.exception is None, done.output
        assert seen.pop() == settings
    assert done.stdout == ""  # --quiet


def test_the_commands_of_the_guide(seen):
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    commands = [line for line in text.splitlines() if line.startswith("sfumato train ") and " ... " not in line]
    commands = [shlex.split(line, comments=True)[2:] for line in commands if "--config" not in line]
    for words in commands:
        done = run(*words)
        assert done.exception is None, f"{words}: {done.output}"
    assert {settings.recipe.name for settings in seen} == set(RECIPES)


def test_a_file_and_flags_over_it(tmp_path, seen):
    settings = jobs.changed(Lora).with_flags({"run__quiet": False, "parallel__process": 0})
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings.to_json()))
    assert run("--config", config).stdout == "out/final\n"
    assert seen.pop() == settings
    run(f"--config={config}", "--out", "there", "--steps", "20", "--target", "all", "--no-flip", "--seed", "0")
    assert seen.pop() == settings.with_flags({
        "run__out": "there", "optimizer__steps": 20, "recipe__targets": ("all",), "data__flip": False, "run__seed": 0,
    })  # fmt: skip
    run("lora", "--config", config, "--rank", "2")
    assert seen.pop().recipe.rank == 2
    done = run("dreambooth", "--config", config)
    assert str(done.exception) == f"{config} is of the recipe lora, and this is dreambooth."
    config.write_text('{"recipe": {"name": "lore"}}')
    assert "has no recipe 'lore'; did you mean 'lora'?" in str(run("--config", config).exception)


def test_mistakes_are_one_sentence_and_status_2(capsys, seen):
    assert ended(capsys, "--config", "nowhere.json") == (
        2, "sfumato: The configuration nowhere.json cannot be read: No such file or directory.\n",
    )  # fmt: skip
    assert ended(capsys, "lora", "-m", "m", "-o", "o")[1].startswith("sfumato: --data is needed: a folder with")
    base = ("lora", "-m", "m", "-o", "o", "-d", "d")
    assert ended(capsys, *base, "--optimizer-option", "b1")[1] == (
        "sfumato: --optimizer-option takes NAME=VALUE, such as b1=0.9, not 'b1'.\n"
    )
    assert ended(capsys, *base, "--size", "512")[1] == "sfumato: --size is a size such as 512x512, not '512'.\n"
    assert ended(capsys, *base, "--dtype", "int8")[0] == 2
    assert not seen


def test_what_training_needs_is_named(capsys):
    missing = ModuleNotFoundError("No module named 'optax'", name="optax")
    with mock.patch("sfumato.train.job.run", side_effect=missing):
        assert ended(capsys, "lora", "-m", "m", "-o", "o", "-d", "d") == (
            2, "sfumato: Training needs optax: pip install 'sfumato[train]'.\n",
        )  # fmt: skip


def test_a_run_that_was_stopped_has_status_130(capsys):
    words = ("lora", "-m", "m", "-o", "o", "-d", "d")
    with mock.patch("sfumato.train.job.run", return_value=SimpleNamespace(stopped=True, final=None)):
        assert ended(capsys, *words) == (130, "")
    with mock.patch("sfumato.train.job.run", side_effect=KeyboardInterrupt):
        status, told = ended(capsys, *words)
    assert (status, told.count("\n")) == (130, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return jobs.furnish(tmp_path_factory.mktemp("place"))


BASE = (
    "-m",
    "model",
    "-d",
    "pictures",
    "--steps",
    "2",
    "--batch",
    "2",
    "--size",
    "16x16",
    "--threads",
    "1",
    "--optimizer",
    "sgd",
    "--clip",
    "0",
)
RUNS = {
    "text-to-image": ("--ema", "0.9", "--rate", "unet=0.5", "--min-snr", "5", "--fsdp"),
    "autoencoder": ("--flip", "--crop", "--zoom", "1.5", "--tensorboard"),
    "controlnet": ("--control", "canny", "--control-option", "low=10", "--cached", "disk", "--schedule", "cosine"),
    "lora": ("--cached", "memory", "--rank", "2", "--target", "attention", "--target", "conv_in"),
    "dreambooth": ("--prompt", "sks dog", "--class-prompt", "a dog", "--class-data", "pictures",
                   "--cached", "memory"),
    "textual-inversion": ("--token", "<cat>", "--start-from", "cat"),
    "instruct-pix2pix": ("--cached", "memory"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_recipe_by_its_command(name, place, monkeypatch):
    monkeypatch.chdir(place)
    done = run(name, *BASE, "-o", name, *RUNS[name])
    assert done.exception is None, repr(done.exception)
    assert done.stdout == f"{name}/final\n"
    assert len(jobs.losses(place / name)) == 2
    final, card = place / name / "final", (place / name / "README.md").read_text()
    assert f"| Recipe | {name} |" in card
    assert f"-m {name}/final" in card or "-m model" in card or f"sfumato.load('{name}/final')" in card
    loads = {"controlnet": sfumato.load_controlnet, "textual-inversion": sfumato.load_embedding}
    loads["lora"] = lambda path: sfumato.load_lora(path / "lora.safetensors", sfumato.load("model"))
    assert loads.get(name, sfumato.load)(final) is not None
    made = {path.name for path in (place / name).iterdir()} - {"final", "README.md"}
    assert made - {"checkpoints", "config.json", "history.json", "metrics.jsonl"} == {
        "controlnet": {"cache"}, "autoencoder": {"tensorboard"},
    }.get(name, set())  # fmt: skip
