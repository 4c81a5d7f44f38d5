"""Linear multistep against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.lms import LMS, lagrange_integrals
from sfumato.schedule import Schedule

from oracle import assert_close
from samplers.oracle import CASES, PICTURE, SD, assert_same, run_ours, run_theirs


def scheduler(kind: str = "native", **config):
    from diffusers import LMSDiscreteScheduler

    return LMSDiscreteScheduler(**SD, **({} if kind == "native" else {f"use_{kind}_sigmas": True}), **config)


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "spacing", "steps"), CASES)
def test_noise_levels(kind, spacing, steps):
    assert_same(LMS(kind), scheduler(kind, timestep_spacing=spacing, steps_offset=1), steps)


@pytest.mark.parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_predictions(prediction):
    assert_same(LMS(), scheduler(prediction_type=prediction), 10)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 4, 9])
def test_from_a_picture(start):
    """The order grows from 1; diffusers is told so, as it would take the weights of a history that it does not have."""
    theirs = scheduler()
    step, count = theirs.step, iter(range(1, 99))
    theirs.step = lambda *args, **kwargs: step(*args, order=min(next(count), 4), **kwargs)
    expected = run_theirs(theirs, 10, start=start, picture=PICTURE)
    ours = run_ours(LMS(), Schedule.from_config(theirs.config), 10, start=start, picture=PICTURE)
    assert_close(ours, expected)


def test_weights_integrate_polynomials_exactly():
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 4):
        nodes, (low, high) = rng.uniform(1, 15, count), (5.0, 3.5)
        for power in range(count):
            exact = (high ** (power + 1) - low ** (power + 1)) / (power + 1)
            assert lagrange_integrals(nodes, low, high) @ nodes**power == pytest.approx(exact, rel=1e-9)
