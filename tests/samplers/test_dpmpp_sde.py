"""DPM++ SDE against the torch reference, with the same noise for both."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_sde import DPMppSDE
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS, Schedule

from samplers.multistep import scheduler
from samplers.oracle import SHAPE, assert_same, run_ours

parity = pytest.mark.parity


def assert_equal(steps: int, start: int = 0, sigmas: str = "native", **config):
    """Our sampler goes where the reference goes if the noise of each stage is independent of that of the other."""
    theirs = scheduler("DPMSolverSDE", sigmas, **config)
    assert_same(DPMppSDE.from_options(theirs.config), theirs, steps, start=start, noise_rows=slice(2 * start, None))


@parity
@pytest.mark.parametrize("steps", [2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_noise_levels(sigmas, spacing, steps):
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
def test_v_prediction():
    assert_equal(10, prediction_type="v_prediction")


@parity
@pytest.mark.parametrize("start", [1, 4, 9])
def test_from_a_picture(start):
    assert_equal(10, start, sigmas="karras")


@pytest.mark.parametrize(("steps", "start"), itertools.product([1, 2, 3, 10], [0, 1]))
def test_a_perfect_network(steps, start):
    """Whatever the noise, the run ends at what the network says."""
    if start >= steps:
        return
    schedule, clean = Schedule(prediction_type="sample"), np.full(SHAPE, 0.3)
    ours = run_ours(DPMppSDE(), schedule, steps, start=start, picture=clean, f=lambda x, t: clean)
    np.testing.assert_allclose(ours, clean, atol=1e-12)


def test_zero_snr_is_finite():
    schedule = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert np.isfinite(run_ours(DPMppSDE(), schedule, 5)).all()


def test_bad_settings():
    with pytest.raises(SfumatoError, match="eta"):
        DPMppSDE(eta=-1.0).table(Schedule(), 5)
    with pytest.raises(SfumatoError, match="spacing"):
        DPMppSDE(sigmas="lu")
