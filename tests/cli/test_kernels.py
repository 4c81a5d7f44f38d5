"""--int8 and --prepare."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import sfumato
from cli.test_cli import run
from sfumato.cli import app
from sfumato.cli.kernels import as_wished


@pytest.mark.parametrize("command", [["generate", "a fox", "-o", "fox.png"], ["bench"]])
def test_both_are_refused(command):
    done = run(*command, "--int8", "--prepare")
    assert done.returncode == 2
    assert done.stderr == "sfumato: --int8 saves memory and --prepare spends it; give one of them.\n"


def test_what_each_does(monkeypatch):
    for name in ("quantize", "prepare"):
        monkeypatch.setattr(sfumato, name, lambda network, name=name: (network, name))
    assert as_wished("net", int8=True, prepare=False) == ("net", "quantize")
    assert as_wished("net", int8=False, prepare=True) == ("net", "prepare")
    assert as_wished("net", int8=False, prepare=False) == "net"


@pytest.mark.slow
def test_bench_tells_that_the_model_was_prepared():
    words = ["bench", "--steps", "1", "--runs", "1", "--size", "64x64", "--prepare"]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["program"]["prepare"] is True
    assert ", prepared, " in CliRunner().invoke(app, words).stdout
