"""What every control keeps to: the laws, over the table of controls in tests/table.py."""

from __future__ import annotations

import dataclasses as dc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, AttendAndExcite, Pix2PixZero, Window, branches
from sfumato.controls import Control
from sfumato.sample import sample, sample_rows
from sfumato.samplers import DDIM, DPMpp2M, Euler
from sfumato.types import pytree

from drive import EXECUTIONS, changed_nets, counted, in_float64, pictures, prepared
from oracle import assert_close
from pictures import drawing
from table import ALL, CLOSED, OPEN, PROMPTS, ROWS, TABLE, cfg, drawings, nothing, over_table

MOVERS = (AttendAndExcite, Pix2PixZero)


# ---- A control that does nothing


@over_table(lambda row: row.neutral is not None)
def test_neutral_is_absent(row, kind, models):
    model = models(kind)
    without = pictures(model, row.beside(kind, 0, ALL))
    got = pictures(model, row.both(kind, **row.neutral))
    # Without its rows of the network's batch, sums may be taken in another order.
    assert_close(got, without, 1e-6 if row.beside is nothing else 0)
    assert np.abs(pictures(model, row.both(kind)) - without).max() > 1e-3, "the control does nothing at all"


@over_table(lambda row: row.windowed, all_kinds=False)
def test_outside_of_its_window_is_absent(row, kind, models):
    model = models(kind)
    without = pictures(model, row.beside(kind, 0, ALL))
    np.testing.assert_array_equal(pictures(model, row.both(kind, window=CLOSED)), without)


@over_table(lambda row: row.windowed and not row.saves, all_kinds=False)
def test_outside_of_its_window_it_costs_nothing(row, kind, models):
    """Every execution of a network is counted: the UNet's, and those of the control's own."""
    model = dc.replace(models(kind), unet=counted(models(kind).unet))

    def executions(controls: Controls) -> int:
        EXECUTIONS[0] = 0
        pictures(model, changed_nets(counted, controls))
        jax.effects_barrier()
        return EXECUTIONS[0]

    without = executions(row.beside(kind, 0, ALL))
    always = executions(row.both(kind, window=OPEN))
    assert without == ROWS
    assert always > without
    assert executions(row.both(kind, window=CLOSED)) == without
    assert executions(row.both(kind, window=Window(0.25, 0.5))) == without + (always - without) / ROWS


@pytree
class Awake(Control):
    """Does nothing, and wants every branch all the same."""

    def wants(self, name, steps):
        return np.full(np.shape(steps.t), True)


@pytest.mark.parametrize("window", [Window(0.25, 0.75), CLOSED], ids=["in the middle", "closed"])
@pytest.mark.parametrize(
    "settings", [{}, {"sampler": DPMpp2M()}, {"image": drawing(), "strength": 0.8}], ids=["plain", "memory", "image"]
)
def test_rows_without_the_unconditional_branch_are_the_same(window, settings, models, monkeypatch):
    monkeypatch.setattr(branches, "SMALL", 0)
    model, controls = models("sd1"), (CFG(5.0, 0.3, window),)
    at_once, by_row = (pictures(model, controls, progress=each, **settings) for each in (None, lambda *_: True))
    awake = pictures(model, (*controls, Awake()), **settings)
    assert_close(at_once, awake, 1e-6)
    assert_close(by_row, awake, 1e-6)
    assert np.abs(awake - pictures(model, (CFG(5.0, 0.3),), **settings)).max() > 1e-3


@pytest.mark.parametrize(
    ("watched", "small", "expected"),
    [
        (False, branches.SMALL, [{8, 16}, {16}, {8}]),
        (True, 0, [{8, 16}, set(), set()]),  # none: they are the first programs again
        (True, branches.SMALL, [{16}, set(), {8}]),
    ],
)
def test_without_guidance_the_network_gets_half_the_rows(models, monkeypatch, watched, small, expected):
    """A small one that is watched only where there is none in all rows."""
    monkeypatch.setattr(branches, "SMALL", small)
    seen = set()

    class Measured(type(models("sd1").unet)):
        def __call__(self, x, *args, **kwargs):
            seen.add(len(x))
            return super().__call__(x, *args, **kwargs)

    unet = jax.tree.map(lambda a: a, models("sd1").unet)
    object.__setattr__(unet, "__class__", Measured)
    model = dc.replace(models("sd1"), unet=unet)
    controls = CFG(5.0, window=Window(0.5, 1.0)), CFG(5.0), CFG(1.0)
    for control, rows in zip(controls, expected, strict=True):
        seen.clear()
        pictures(model, (control,), progress=(lambda *_: True) if watched else None)
        assert seen == rows


# ---- Order, drivers, precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1"])
def test_the_order_of_controls_does_not_matter(kind, models):
    """All of the table at once, and backwards, so that every two of them change places: but for those that move the
    latents by gradients, each of which sees what the one before it has made of them."""
    rows = [row for row in TABLE if kind in row.kinds and row.name != "two ControlNets"]  # there are two without it
    controls = {repr(row.make): row.make(kind, 0, ALL) for row in rows if row.beside is nothing}
    controls |= {row.name: row.make(kind, 0, ALL) for row in rows if row.beside is not nothing}
    controls = [each for group in controls.values() for each in group] + list(cfg(kind, 1))
    movers = iter([each for each in controls if isinstance(each, MOVERS)])
    backwards = [next(movers) if isinstance(each, MOVERS) else each for each in controls[::-1]]
    forth, back = (in_float64(models(kind), tuple(order)) for order in (controls, backwards))
    assert forth.dtype == np.float64
    assert_close(forth, back, 1e-11)


@over_table(all_kinds=False)
def test_row_by_row_is_the_same(row, kind, models):
    seen = []

    def progress(done, total, preview):
        seen.append((done, total, np.asarray(preview)))

    at_once = pictures(models(kind), row.both(kind))
    step_by_step = pictures(models(kind), row.both(kind), progress=progress)
    assert_close(step_by_step, at_once, 1e-6)
    assert [each[:2] for each in seen] == [(done + 1, ROWS) for done in range(ROWS)]
    np.testing.assert_array_equal(seen[-1][2], step_by_step)


def test_progress_cancels(models):
    seen = []
    with pytest.raises(sfumato.Cancelled, match=r"Cancelled after row 2 of 4\."):
        pictures(models("sd1"), cfg("sd1"), progress=lambda done, *_: seen.append(done) or done < 2)
    assert seen == [1, 2]


@over_table(all_kinds=False)
def test_bfloat16_is_finite(row, kind, models):
    def half(network: Any) -> Any:
        return jax.tree.map(lambda a: a.astype(jnp.bfloat16), network)

    model = dc.replace(models(kind), unet=half(models(kind).unet))
    got = pictures(model, changed_nets(half, row.both(kind)))
    assert got.dtype == np.float32
    assert np.isfinite(got).all()
    assert_close(got, pictures(models(kind), row.both(kind)), 0.2)


def test_rows_that_are_not_active_change_nothing(models):
    """Not even if they hold what is no number."""
    model = models("sd1")
    unet, steps, controls, x, base = prepared(model, TABLE[2].both("sd1"))

    def padded(column):
        empty = jnp.full((1, *column.shape[1:]), jnp.nan).astype(column.dtype)
        return jnp.concatenate([empty, column[:2], empty, column[2:], empty])

    more = jax.tree.map(padded, steps)
    more = dc.replace(more, active=jnp.array([False, True, True, False, True, True, False]))

    def run(drive: Any, steps: Any) -> Any:
        return drive(unet, DDIM(), steps, controls, jnp.array(x), base, model.schedule.prediction_type)

    want = np.asarray(run(sample, steps))
    np.testing.assert_array_equal(np.asarray(run(sample, more)), want)
    by_row = [np.asarray(each) for each in run(sample_rows, more)]
    assert len(by_row) == ROWS
    assert_close(by_row[-1], want, 1e-6)


# ---- Compiling


@over_table(all_kinds=False)
def test_nothing_is_compiled_when_data_changes(row, kind, models, compiled):
    model, other = models(kind), dc.replace(models(kind), unet=jax.tree.map(lambda a: a * 0.9, models(kind).unet))
    changed = row.both(kind, 1)
    first = pictures(model, row.both(kind), output="images")
    compiled.clear()
    again = pictures(model, row.both(kind), output="images")
    np.testing.assert_array_equal(again, first)
    assert np.any(pictures(model, changed, output="images") != first)
    assert np.any(pictures(other, row.both(kind), output="images") != first)
    changes = {
        "prompt": [prompt + " in the snow" for prompt in PROMPTS], "negative": "dark", "seed": 2**40,
        "sampler": DDIM(eta=0.7),
    }  # fmt: skip
    for name, value in changes.items():
        assert np.any(pictures(model, row.both(kind), output="images", **{name: value}) != first), name
    assert compiled == []


def test_nothing_is_compiled_when_image_to_image_changes(models, compiled):
    model, controls = models("sd1"), cfg("sd1")
    first = pictures(model, controls, image=drawing(), strength=0.5)
    compiled.clear()
    assert np.any(pictures(model, controls, image=drawing().rotate(90), strength=0.5) != first)
    assert np.any(pictures(model, controls, image=drawing(), strength=0.8) != first)
    assert compiled == []


def test_nothing_is_compiled_when_data_changes_row_by_row(models, compiled):
    model = models("sd1")
    # Made first: a ControlNet that no test before has asked for compiles its random numbers.
    both = [TABLE[2].both("sd1", variant) for variant in (0, 1)]
    for variant, controls in enumerate(both):
        compiled.clear()
        pictures(model, controls, progress=lambda *_: True, seed=variant)
    assert compiled == []


@pytest.mark.parametrize("watched", [False, True])
def test_nothing_is_compiled_when_a_window_moves(models, compiled, watched):
    """Once there is a row without guidance and one with it."""
    model, progress = models("sd1"), (lambda *_: True) if watched else None
    for window in (Window(0.25, 0.5), Window(0.5, 0.75), Window(0.5, 1.0), Window(0.0, 0.75)):
        pictures(model, (CFG(5.0, window=window),), progress=progress)
        if window.start > 0.25:
            assert compiled == []
        compiled.clear()


def test_another_set_of_controls_compiles_the_loop_alone(models, compiled):
    model = models("sd1")
    settings = {"sampler": Euler(), "output": "images"}  # which no other law runs
    for controls in (cfg("sd1"), (*cfg("sd1"), *cfg("sd1", 1))):
        compiled.clear()
        pictures(model, controls, **settings)
        pictures(model, controls, **settings)
    assert compiled == ["jit(_whole)"]


# ---- Pictures do not know of each other


@over_table(all_kinds=False)
def test_a_picture_is_the_same_alone_and_in_any_order(row, kind, models):
    model = models(kind)
    together = pictures(model, row.both(kind))
    alone = [pictures(model, row.both(kind, pictures=[number]), [number]) for number in (0, 5)]
    assert_close(np.concatenate(alone), together[[0, 5]], 1e-5)
    order = [3, 7, 1, 0, 2, 6, 5, 4]
    assert_close(pictures(model, row.both(kind, pictures=order), order), together[order], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_a_picture_is_the_same_in_rounds(batch, models):
    """Also those that start from a picture each."""
    row, chosen = TABLE[5], [4, 1, 2, 0]
    settings = {"image": drawings(0, chosen), "strength": 0.8, "sampler": DDIM(eta=0.5)}
    want = pictures(models("sd1"), row.both("sd1", pictures=chosen), chosen, **settings)
    assert_close(pictures(models("sd1"), row.both("sd1", pictures=chosen), chosen, batch=batch, **settings), want, 1e-5)


@pytest.mark.slow
def test_devices(saved):
    """tests/devices.py, where the machine seems to have eight devices."""
    here = Path(__file__).parent
    environment = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent / "src")]),
    }  # fmt: skip
    folders = [str(saved(kind)[0]) for kind in ("sd1", "sdxl", "sdxl-refiner")]
    command = [sys.executable, str(here / "devices.py"), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["devices"] == 8
    assert facts["collectives"] == []
    assert facts["loop"], "no loop was found in the program, so that the search proves nothing"
    assert facts["lies_on"] == [3]
    for batch, difference in facts["differences"].items():
        assert difference <= 1e-5, f"{batch} differ by {difference:.1e} of the range"
