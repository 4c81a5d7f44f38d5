"""The figures of `sfumato bench`. How large they are is no matter of tests."""

from __future__ import annotations

import dataclasses as dc
import json

import pytest
from typer.testing import CliRunner

from sfumato.bench import Figures, Times, bench, tuned
from sfumato.cli import app
from sfumato.cli.bench import table
from sfumato.errors import SfumatoError
from sfumato.models.kernels.table import usual


@pytest.fixture(scope="module")
def figures() -> Figures:
    return bench("emoji", steps=2, runs=3, count=2)


def test_every_part_is_measured_as_often_as_asked(figures):
    for times in (figures.whole, figures.sampled, figures.decoded):
        assert len(times.each) == 3
        assert min(times.each) > 0
    assert figures.load > 0
    assert figures.first > figures.whole.median, "the first run compiles"
    assert figures.memory["process"] > 100 * 2**20


def test_the_record_says_what_was_measured_and_where(figures):
    found = json.loads(json.dumps(figures.record()))
    assert (
        found["program"] | {"model": "emoji", "steps": 2, "pictures": 2, "size": [128, 128], "runs": 3}
        == (found["program"])
    )
    assert found["machine"]["devices"][0].startswith("cpu")
    assert found["program"]["tuned"] is None
    assert found["whole"]["least"] <= found["whole"]["median"] <= found["whole"]["most"]


def test_the_table_has_medians_and_spreads(figures):
    text = table(dc.replace(figures, whole=Times((2.0, 1.0, 4.0)), sampled=Times((1.0,) * 3)))
    assert "2.000 s  (1.000 to 4.000)" in text
    assert "2 pictures of 128x128, 2 steps" in text
    assert "step                       0.500 s" in text
    assert "pictures a second          1.000" in text
    assert "\nkernels not tuned (`sfumato bench --tune`)\n" in text


@pytest.mark.parametrize(("changes", "said"), [
    ({"rows": 256, "query_block": 128}, "kernels tuned: query_block 128, rows 256"),
    ({}, "kernels tuned: nothing to change"),
])  # fmt: skip
def test_it_says_whether_the_kernels_are_tuned(figures, monkeypatch, changes, said):
    monkeypatch.setattr("sfumato.bench.measured", lambda: dc.replace(usual(), **changes))
    assert tuned() == changes
    program = {**figures.program, "tuned": tuned()}
    assert said in table(dc.replace(figures, program=program)).splitlines()


def test_the_command_prints_json():
    done = CliRunner().invoke(app, ["bench", "--steps", "1", "--runs", "1", "--size", "64x64", "--int8", "--json"])
    assert done.exit_code == 0, done.output
    program = json.loads(done.stdout)["program"]
    assert (program["size"], program["int8"]) == ([64, 64], True)


def test_no_run_at_all_is_refused():
    with pytest.raises(SfumatoError, match="runs must be a whole number from 1 on, not 0"):
        bench("emoji", runs=0)
