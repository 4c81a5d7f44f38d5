"""PLMS against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.ddim import DDIM
from sfumato.samplers.pndm import PNDM
from sfumato.schedule import Schedule

from oracle import assert_close
from samplers.oracle import PICTURE, SD, assert_same, network, run_ours, run_theirs, true_strides


def scheduler(**config):
    from diffusers import PNDMScheduler

    return PNDMScheduler(**{**SD, "skip_prk_steps": True, "steps_offset": 1, **config})


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
def test_steps(steps):
    assert_same(PNDM(), scheduler(), steps)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_v_prediction(steps):
    """The reference is told eps, worked out of the same network's v: of v itself it mixes the wrong terms."""
    schedule = Schedule.from_config({**scheduler().config, "prediction_type": "v_prediction"})

    def eps(x, t):
        (alpha,), (sigma,) = schedule.at(np.array([t]))
        return sigma * x + alpha * network(x, t)

    assert_close(run_ours(PNDM(), schedule, steps), run_theirs(scheduler(), steps, f=eps))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_converges_faster_than_ddim(prediction):
    """For pictures of independent pixels, N(0.2, 0.3), of which a network can know all that there is to know."""
    schedule = Schedule(prediction_type=prediction)

    def best(x, t):
        (a,), (s,) = schedule.at(np.array([t]))
        x0 = 0.2 + 0.3 * a / (0.3 * a**2 + s**2) * (x - 0.2 * a)
        eps = (x - a * x0) / s
        return eps if prediction == "epsilon" else a * eps - s * x0

    exact = run_ours(DDIM(), schedule, 1000, f=best)
    errors = [np.abs(run_ours(sampler, schedule, 50, f=best) - exact).max() for sampler in (PNDM(), DDIM())]
    assert errors[0] < errors[1] / 5


@pytest.mark.parity
@pytest.mark.parametrize("config", [{"set_alpha_to_one": True}, {"timestep_spacing": "trailing"}], ids=str)
def test_configurations(config):
    assert_same(PNDM(), scheduler(**config), 10)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 2, 5, 8, 9])
def test_from_a_picture(start):
    """diffusers with the timesteps of a run that begins there. (Its pipelines cut timesteps[start:] off the list, in
    which one timestep is there twice.)"""
    theirs = scheduler()
    theirs.set_timesteps(10)
    t = theirs.timesteps.unique().flip(0)[start:].tolist()
    expected = run_theirs(theirs, 10, picture=PICTURE, timesteps=[*t[:2], *t[1:]] if len(t) > 1 else t)
    ours = run_ours(PNDM(), Schedule.from_config(theirs.config), 10, start=start, picture=PICTURE)
    assert_close(ours, expected)


@pytest.mark.parity
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 7)])
def test_steps_end_at_the_next_timestep(spacing, steps):
    """diffusers' equal strides corrected; its step is told the first stride again to go the first step again."""
    theirs = scheduler(timestep_spacing=spacing)
    correct = true_strides(theirs, steps)
    first = float(theirs.timesteps[0])

    def before(i, t):
        correct(i, first if i == 1 else t)

    assert_same(PNDM(), theirs, steps, before=before)


def test_zero_snr():
    """The first step is DDIM's, and the second evaluation at its end leaves it so."""
    schedule = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    steps = PNDM().table(schedule, 10).steps
    np.testing.assert_array_equal([steps.coefficients[f"w{k}"][1] for k in range(4)], [0, 1, 0, 0])
    assert np.abs(run_ours(PNDM(), schedule, 50) - run_ours(DDIM(), schedule, 1000)).max() < 0.05


@pytest.mark.parametrize("start", [0, 3, 9])
def test_rows(start):
    steps = PNDM().table(Schedule(), 10, start).steps
    active = steps.active
    assert len(active) == 11
    assert active.sum() == (1 if start == 9 else 11 - start)
    assert steps.t[active][0] == 900 - 100 * start
    assert steps.progress[active][0] == 0
