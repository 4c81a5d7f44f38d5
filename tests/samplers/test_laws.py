"""What every sampler keeps to, whatever its paper says."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.samplers import NAMES, SAMPLERS, Table
from sfumato.schedule import Schedule

from oracle import assert_close
from samplers.oracle import NOISE, PICTURE, advance, rows, run_ours

ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
SCHEDULES = [Schedule(steps_offset=1), Schedule(prediction_type="v_prediction"), Schedule(**ZERO_SNR)]
TWICE = ("heun", "dpm2", "dpm2 a", "dpm++ 2s a", "dpm++ sde")
"""Those that take two rows a step, but one for the last."""

every_sampler = pytest.mark.parametrize("name", NAMES)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=["epsilon", "v", "zero-snr"])
of_numbers = pytest.mark.parametrize(
    ("name", "field"), [(name, f.name) for name, make in NAMES.items() for f in dc.fields(make) if not f.compare]
)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(shape)


@every_sampler
@every_schedule
@pytest.mark.parametrize("start", [0, 5, 9])
def test_a_perfect_network_leads_to_the_picture(name, schedule, start):
    """Every row hands on latents of the level that it promises: exactly so if nothing is drawn, and else in their
    standard deviation. The last are the picture, or what noise the end still has."""
    sampler = NAMES[name]()
    with jax.enable_x64(True):
        table = sampler.table(schedule, 10, start)
        x0, eps = jnp.asarray(np.tanh(draw(1, 64, 64, 4))), jnp.asarray(draw(1, 64, 64, 4)[:, ::-1])
        noise, state = draw(len(table.steps.t), 1, 64, 64, 4), None
        for row in rows(table, noise if sampler.stochastic else None):
            if state is None:
                x = row.alpha * x0 + row.sigma * eps
                state = sampler.init(x)
            x, state = advance(sampler, x, x0, (x - row.alpha * x0) / row.sigma, row, state)
            found, promised = x - row.alpha_next * x0, row.sigma_next * eps
            if sampler.stochastic:
                assert float(found.std()) == pytest.approx(float(row.sigma_next), rel=0.03, abs=1e-4)
            else:
                np.testing.assert_allclose(found, promised, atol=1e-8)
        assert float(row.alpha_next) >= schedule.alphas[0] - 1e-12


@every_sampler
@every_schedule
def test_tables(name, schedule):
    for steps, start in ((1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 2), (10, 0), (10, 4), (10, 9), (10, 10)):
        check_table(NAMES[name]().table(schedule, steps, start), name, steps, start)


def check_table(table: Table, name: str, steps: int, start: int) -> None:
    row = table.steps
    count = 2 * steps - 1 if name in TWICE else steps + 1 if name in ("pndm", "plms") and steps > 1 else steps
    for column in (row.progress, row.active, row.t, row.alpha, row.sigma, row.alpha_next, row.sigma_next):
        assert column.shape == (count,)
    for column in (row.t, row.alpha, row.sigma, row.alpha_next, row.sigma_next, *row.coefficients.values()):
        assert column.dtype == np.float64
        assert column.shape == (count,)
        assert np.isfinite(column.astype(np.float32)).all()
    np.testing.assert_array_equal(row.index, np.arange(count))
    np.testing.assert_allclose([np.hypot(row.alpha, row.sigma), np.hypot(row.alpha_next, row.sigma_next)], 1)
    assert (np.diff(row.active.astype(int)) >= 0).all()
    assert row.active.any() == (start < steps)
    active = row.active
    assert (np.diff(row.progress[active]) > 0).all()
    assert (row.progress[active][:1] == 0).all()
    assert ((row.progress >= 0) & (row.progress < 1)).all()
    assert ((row.t >= 0) & (row.t < 1000)).all()
    np.testing.assert_allclose(row.alpha_next[active][:-1], row.alpha[active][1:], rtol=1e-12)
    assert 0 < table.start_sigma <= 1


@every_sampler
@every_schedule
@pytest.mark.parametrize("steps", [1, 3, 20])
def test_float32_is_enough(name, schedule, steps):
    """Also at zero terminal SNR, where x / alpha is thousands."""
    sampler = NAMES[name]()
    single, double = (run_ours(sampler, schedule, steps, dtype=dtype) for dtype in (np.float32, np.float64))
    assert_close(single, double, 1e-3)


@every_sampler
def test_what_is_remembered_keeps_its_shape(name):
    """So that it can be carried through a scan."""
    sampler, x = NAMES[name](), jnp.zeros((2, 4, 4, 4))
    row = next(rows(sampler.table(Schedule(), 3), np.zeros((9, 2, 4, 4, 4), np.float32)))
    state = jax.eval_shape(sampler.init, x)
    after = jax.eval_shape(lambda x, state: sampler.step(x, x, x, row, state), x, state)
    assert jax.tree.structure(after) == jax.tree.structure((x, state))
    shapes = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (after, (x, state))]
    assert shapes[0] == shapes[1]


@of_numbers
def test_numbers_are_data(name, field):
    """Changing one changes the table, and with it the picture, but not the program."""
    sampler = NAMES[name]()
    other = dc.replace(sampler, **{field: 0.4})
    assert (sampler, hash(sampler)) == (other, hash(other))
    results = [run_ours(sampler, Schedule(), 3)]
    programs = advance._cache_size()
    results.append(run_ours(other, Schedule(), 3))
    assert advance._cache_size() == programs
    assert np.abs(results[0] - results[1]).max() > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_names(name):
    """Each name is a sampler of its own, which draws what it says that it draws."""
    sampler = SAMPLERS[name]()
    same = {other for other in SAMPLERS if SAMPLERS[other]() == sampler}
    assert same == {name} or same == {"pndm", "plms"}
    finite = run_ours(sampler, Schedule(), 4, picture=PICTURE, start=1)
    assert np.isfinite(finite).all()
    assert finite.shape == NOISE.shape
