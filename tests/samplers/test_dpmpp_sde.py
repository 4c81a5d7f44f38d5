"""DPM++ SDE against the torch reference, with the same noise for both."""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_sde import DPMppSDE
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS, Schedule

from samplers.multistep import FLAGS
from samplers.oracle import SD, SHAPE, assert_same, draws, run_ours

parity = pytest.mark.parity


@pytest.fixture
def assert_equal(monkeypatch):
    """Our sampler goes where the reference goes if the noise of each stage is independent of that of the other.

    The reference's module asks for torchsde at its import, for the Brownian path that is replaced here.
    """
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")

    def check(steps: int, start: int = 0, sigmas: str = "native", **config):
        import torch

        drawn = iter(draws(4 * steps)[2 * start :])
        monkeypatch.setattr(module, "BrownianTreeNoiseSampler", lambda *_: lambda *_: torch.from_numpy(next(drawn)))
        theirs = module.DPMSolverSDEScheduler(**SD, **FLAGS[sigmas], **config)
        assert_same(DPMppSDE.from_options(theirs.config), theirs, steps, start=start)

    return check


@parity
@pytest.mark.parametrize("steps", [2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_noise_levels(sigmas, spacing, steps, assert_equal):
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
def test_v_prediction(assert_equal):
    assert_equal(10, prediction_type="v_prediction")


@parity
@pytest.mark.parametrize("start", [1, 4, 9])
def test_from_a_picture(start, assert_equal):
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
