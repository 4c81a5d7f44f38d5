"""Which numbers `sfumato bench --tune` chooses, given how long everything takes; and what it keeps."""

from __future__ import annotations

import dataclasses as dc
import functools
import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import sfumato.tune as place
from sfumato.cli import app
from sfumato.errors import SfumatoError
from sfumato.models.kernels.table import NEVER, VALUES, Table, in_use, measured, read, using, usual
from sfumato.tune import ITEMS, Item, attention, choose, convolutions, feed_forward, tune


def item(number: str, *numbers: str) -> Item:
    """What it computes tells with which values of `numbers`: its own, if no other is named."""

    def made(x):
        return jnp.stack([x * getattr(in_use(), name) for name in numbers or (number,)])

    return Item(number, f"the {number}", (lambda: (made, (jnp.ones((), int),)),))


class Clock:
    """Says what a run took by what it computed. `costs` may differ from run to run; those of others are 100."""

    def __init__(self, costs: dict[int | tuple[int, ...], float | list[float]]):
        self.costs, self.ran = costs, []

    def __call__(self, program):
        made = program()
        values = tuple(int(value) for value in made)
        key = values if len(values) > 1 else values[0]
        cost = self.costs.get(key, 100.0)
        self.ran.append(key)
        return made, cost[self.ran.count(key) - 1] if isinstance(cost, list) else cost


def test_the_fastest_is_chosen():
    found = choose(item("rows"), Table(), 3, Clock({128: 90.0, 1024: 80.0, 2048: 85.0}))
    assert (found.before, found.after, found.ratio) == (512, 1024, 0.8)


@pytest.mark.parametrize(("cost", "after", "ratio"), [(98.0, 512, 1.0), (97.5, 512, 1.0), (96.5, 1024, 0.965)])
def test_a_little_faster_is_not_faster(cost, after, ratio):
    found = choose(item("rows"), Table(), 3, Clock({1024: cost}))
    assert (found.after, found.ratio) == (after, ratio)


def test_who_was_lucky_must_be_so_again():
    """1024 is the best of all in the first rounds, and no better in the rounds against the package's alone."""
    found = choose(item("rows"), Table(), 3, Clock({1024: [0.0, 70.0, 70.0, 70.0] + [100.0] * 4, 128: 80.0}))
    assert (found.after, found.ratio) == (512, 1.0)


def test_the_median_decides_and_the_first_round_does_not_count():
    clock = Clock({512: [1.0, 100.0, 2.0, 100.0] * 2, 1024: [900.0, 900.0, 50.0, 50.0] * 2})
    assert choose(item("rows"), Table(), 3, clock).after == 1024


def test_all_take_turns_and_then_the_best_two():
    clock = Clock({256: 50.0})
    choose(item("query_block"), Table(), 2, clock)
    assert clock.ran == [1024, 256, 512, 2048] * 3 + [1024, 256] * 3


def test_what_makes_the_same_program_runs_once_and_cannot_win():
    clock = Clock({512: [100.0, 100.0, 90.0, 50.0]})
    assert choose(item("query_block", "rows"), Table(), 3, clock).after == 1024
    assert clock.ran == [512] * 4


def test_the_times_of_all_works_count_together():
    first = item("rows")
    second = Item("rows", "both", (*first.works, lambda: (lambda x: x[None] * in_use().rows + 7, (jnp.ones((), int),))))
    costs = {512: 10.0, 519: 10.0, 128: 5.0, 135: 16.0, 256: 9.0, 263: 9.0}
    assert choose(first, Table(), 3, Clock(costs)).after == 128
    assert choose(second, Table(), 3, Clock(costs)).after == 256


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", str(tmp_path / "cache"))
    measured.cache_clear()
    yield tmp_path / "cache" / "kernels.json"
    measured.cache_clear()


def test_each_is_chosen_with_those_before_it_and_all_are_kept(file):
    lines, clock = [], Clock({128: 50.0, (256, 128): 40.0})
    choices, path = tune([item("rows"), item("query_block", "query_block", "rows")], clock=clock, watch=lines.append)
    assert lines == ["1 of 2: the rows", "2 of 2: the query_block"]
    assert [(choice.number, choice.after) for choice in choices] == [("rows", 128), ("query_block", 256)]
    assert path == file
    assert read(path) == measured() == dc.replace(usual(), rows=128, query_block=256)
    assert [each.name for each in file.parent.iterdir()] == [file.name]


def test_what_an_earlier_time_found_is_no_part_of_the_next(file):
    tune([item("rows")], clock=Clock({128: 50.0}))
    assert in_use().rows == 128
    assert tune([item("rows")], clock=Clock({}))[0][0].before == 512
    assert read(file) == usual()


def test_without_a_place_nothing_is_measured(monkeypatch):
    monkeypatch.setenv("SFUMATO_CACHE", "off")
    with pytest.raises(SfumatoError, match=r"no place to keep what is measured: SFUMATO_CACHE is off; it may name a"):
        tune([item("rows")], clock=lambda program: pytest.fail("measured"))


def test_what_it_refuses(file, monkeypatch):
    with pytest.raises(SfumatoError, match="runs must be a whole number from 1 on, not 0"):
        tune(runs=0)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with pytest.raises(SfumatoError, match="jax computes on a tpu here"):
        tune()
    assert not file.exists()


def test_there_is_an_item_for_every_number():
    assert sorted(each.number for each in ITEMS) == sorted(VALUES)


@pytest.mark.slow
@pytest.mark.parametrize("each", ITEMS, ids=lambda each: each.number)
def test_what_is_measured_tells_the_values_apart(each, monkeypatch):
    """But for two: from 4096 places on blocks are small anyway, as the package has it, and 512 places of many channels
    are one block whatever its size."""
    monkeypatch.setattr(place, "_random", lambda shape, dtype, *_: jax.ShapeDtypeStruct(shape, dtype))
    made = [make() for make in each.works]
    texts = set()
    for value in VALUES[each.number]:
        with using(Table(**{each.number: value})):
            texts.add("".join(jax.jit(function).lower(*arrays).as_text() for function, arrays in made))
    assert len(texts) == len(VALUES[each.number]) - (each.number in ("bfloat16_f2", "bfloat16_f2_few"))


@pytest.fixture
def tiny(file, monkeypatch):
    """The items at sizes that take no time and where all values make the same program, and `file`."""
    works = {"query_block": (attention, 8, 1, 4), "rows": (feed_forward, 8, 4)}
    dtypes = {"bfloat16_wide": ("float32",)}
    monkeypatch.setattr(place, "ITEMS", tuple(
        Item(each.number, each.name, tuple(
            functools.partial(*works.get(each.number, (convolutions, 1, 4, 4)), dtype)
            for dtype in dtypes.get(each.number, place.BOTH)))
        for each in ITEMS
    ))  # fmt: skip
    return file


def test_the_command_measures_prints_and_keeps(tiny):
    done = CliRunner().invoke(app, ["bench", "--tune", "--runs", "1"])
    assert done.exit_code == 0, done.output
    count = len(ITEMS)
    assert done.stderr.splitlines() == [f"{number} of {count}: {each.name}" for number, each in enumerate(ITEMS, 1)]
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["before", "after", "ratio"]
    wide = str(usual().bfloat16_wide)
    assert [line.split()[-3:] for line in lines[1:3]] == [[wide, wide, "1.00"], ["1024", "1024", "1.00"]]
    assert lines[-1] == f"Kept in {tiny}, which later runs read; to go back, delete it."
    assert read(tiny) == usual()


def test_never_is_a_word(tiny):
    from sfumato.cli.bench import chosen

    text = chosen([place.Choice("float32_f4", "from places", 1024, NEVER, 0.5)], tiny)
    assert text.splitlines()[1].split() == ["from", "places", "1024", "never", "0.50"]


def test_the_command_prints_json(tiny):
    done = CliRunner().invoke(app, ["bench", "--tune", "--runs", "1", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)[2] == {
        "number": "rows", "name": ITEMS[2].name, "before": 512, "after": 512, "ratio": 1.0
    }  # fmt: skip


def test_what_is_about_a_model_does_not_go_with_it(tiny):
    done = CliRunner().invoke(app, ["bench", "--tune", "--steps", "3"])
    assert str(done.exception).startswith("--tune measures no model: of the other options")
    assert not tiny.exists()
