from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from sfumato.errors import SfumatoError
from sfumato.train.metrics import Metrics, keep


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(folder, first, last, **settings):
    with Metrics(folder, start=first, steps=last, **settings) as log:
        for step in range(first + 1, last + 1):
            log.add(step, {"loss": 0.1 * step, "grad_norm": 1.0}, samples=4)


def test_a_line_of_json_each_step(tmp_path):
    write(tmp_path / "run", 0, 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["loss"] for line in lines] == [0.1 * 1, 0.1 * 2, 0.1 * 3]
    assert "samples_per_second" not in lines[0]
    assert lines[2]["samples_per_second"] > 0


def test_a_resumed_run_has_every_step_once(tmp_path):
    write(tmp_path, 0, 7)
    write(tmp_path, 4, 9)
    assert steps(tmp_path / "metrics.jsonl") == list(range(1, 10))


def test_the_rest_of_a_killed_line_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    keep(path, 5)
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_what_is_not_finite_is_still_json(tmp_path):
    with Metrics(tmp_path) as log:
        log.add(1, {"loss": 1.0, "ratio": float("nan")}, samples=1)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_other_processes_write_nothing(tmp_path):
    write(tmp_path, 0, 2, write=False, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path):
    write(tmp_path, 0, 2, tensorboard=True)
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in file.read_bytes()


def test_tensorboard_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SfumatoError, match=r"pip install tensorboardX\.$"):
        Metrics(tmp_path, tensorboard=True)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SfumatoError, match=r"metrics cannot be written to .*file"):
        Metrics(tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk(tmp_path):
    message = r"^The metrics of step 1 cannot be written to .*: No space left on device\.$"
    with Metrics(tmp_path) as log, Path("/dev/full").open("a") as full:
        log.file = full
        with pytest.raises(SfumatoError, match=message):
            log.add(1, {"loss": 1.0}, samples=1)
        full.truncate = full.close = lambda: None  # what is in its buffer cannot be written either


def test_no_bar_without_a_terminal_or_when_quiet(capfd, monkeypatch):
    with Metrics(None, steps=2) as log:
        assert log.bar.disable
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes any stream for a terminal
    with Metrics(None, steps=2, quiet=True) as log:
        assert log.bar.disable
    assert capfd.readouterr() == ("", "")


def test_the_bar_tells_loss_and_pace(capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    write(None, 0, 3)
    told = capfd.readouterr().err
    assert "loss 0.3" in told
    assert "samples/s" in told
    assert "3/3" in told
