"""Euler ancestral against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.euler import Euler
from sfumato.samplers.euler_ancestral import EulerAncestral
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import SD, assert_same, run_ours


def scheduler(**config):
    from diffusers import EulerAncestralDiscreteScheduler

    return EulerAncestralDiscreteScheduler(**SD, **config)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10, 25])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps(spacing, prediction, steps):
    assert_same(EulerAncestral(), scheduler(timestep_spacing=spacing, prediction_type=prediction), steps)


@pytest.mark.parity
def test_zero_snr():
    theirs = scheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    assert_same(EulerAncestral(), theirs, 10)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 9])
def test_from_a_picture(start):
    assert_same(EulerAncestral(), scheduler(), 10, start=start)


@pytest.mark.parametrize("kind", KINDS)
def test_eta_0_is_euler(kind):
    schedule = Schedule()
    ours = run_ours(EulerAncestral(kind, eta=0.0), schedule, 10)
    np.testing.assert_allclose(ours, run_ours(Euler(kind), schedule, 10), atol=1e-12)
