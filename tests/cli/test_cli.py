"""The command line as a process of its own: output, one sentence for a mistake, exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import sfumato


def run(*args: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run([sys.executable, "-m", "sfumato", *args], capture_output=True, text=True, env=environment)


@pytest.fixture
def embedding(tmp_path):
    path = tmp_path / "embedding.safetensors"
    save_file({"<cat>": np.ones((2, 768), np.float32)}, path)
    return path


def test_version():
    assert run("--version").stdout == f"sfumato {sfumato.__version__}\n"


def test_help_names_the_commands():
    out = run("--help").stdout
    assert "inspect" in out


@pytest.mark.parametrize(("words", "sentence"), [
    (("generate",), "Missing argument 'prompt'; `sfumato generate -h` says what it takes."),
    (("generate", "a fox", "--sted", "3"), "No such option: --sted (Possible options: --seed, --size, --steps)"),
    (("generate", "a fox", "--steps", "many"), "Invalid value for '--steps'"),
    (("gen",), "No such command 'gen'; `sfumato -h` says what it takes."),
    (("train", "lora", "--ranc", "3"), "No such option: --ranc"),
])  # fmt: skip
def test_words_that_do_not_fit_are_one_sentence(words, sentence):
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("sfumato: ")
    assert done.stderr.count("\n") == 1
    assert sentence in done.stderr


@pytest.mark.parametrize("words", [(), ("train",)])
def test_without_words_there_is_help(words):
    done = run(*words)
    assert done.returncode == 2
    assert "Usage: sfumato" in done.stdout + done.stderr


def test_inspect(embedding):
    out = run("inspect", str(embedding))
    assert out.returncode == 0
    assert "textual inversion" in out.stdout
    assert "<cat>" in out.stdout
    assert not out.stderr


def test_inspect_as_json(embedding):
    value = json.loads(run("inspect", "--json", str(embedding)).stdout)
    assert value["kind"] == "textual inversion"
    assert value["family"] == "sd1"
    assert value["problem"] is None


def test_inspect_of_a_broken_file_exits_with_1(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265146304\n")
    out = run("inspect", str(path))
    assert out.returncode == 1
    assert "git" in out.stdout
    assert not out.stderr


def test_inspect_deep_finds_what_is_not_a_number(tmp_path):
    path = tmp_path / "embedding.safetensors"
    save_file({"<cat>": np.full((2, 768), np.nan, np.float32)}, path)
    assert run("inspect", str(path)).returncode == 0
    out = run("inspect", "--deep", str(path))
    assert out.returncode == 1
    assert "NaN" in out.stdout


def test_a_mistake_is_one_sentence_and_status_2():
    out = run("inspect", "nothing-here.safetensors")
    assert out.returncode == 2
    assert out.stdout == ""
    assert out.stderr.startswith("sfumato: ")
    assert out.stderr.count("\n") == 1


@pytest.mark.parametrize(("words", "status"), [(["--version"], 0), (["gen"], 2), (["inspect", "none"], 2)])
def test_a_process_ends_at_once_but_tidily(words, status):
    """With its exit status, and after all that was to be done at its end."""
    program = (
        "import atexit; from sfumato import cli\n"
        "class Late:\n    def __del__(self): print('taken apart')\n"
        "late, main = Late(), cli.main\n"
        "cli.main = lambda: (atexit.register(print, 'tidied'), main())\n"
        "cli.process()"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert done.returncode == status
    assert "tidied" in done.stdout
    assert "taken apart" not in done.stdout


def test_an_exception_that_nobody_expects_is_shown_with_status_1():
    program = "from sfumato import cli; cli.main = lambda: 1 / 0; cli.process()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
