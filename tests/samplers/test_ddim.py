"""DDIM against the torch reference, and what eta means."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.ddim import DDIM
from sfumato.samplers.ddpm import DDPM
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import SD, assert_same, true_strides


def scheduler(**config):
    from diffusers import DDIMScheduler

    return DDIMScheduler(**{**SD, "clip_sample": False, "steps_offset": 1, **config})


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10, 25])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_and_eta(eta, spacing, steps):
    assert_same(DDIM(eta=eta), scheduler(timestep_spacing=spacing), steps, eta=eta)


@pytest.mark.parity
@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 4), ("linspace", 25), ("trailing", 7), ("leading", 7)])
def test_steps_end_at_the_next_timestep(spacing, steps):
    """Where diffusers' equal strides miss it, they are corrected."""
    theirs = scheduler(timestep_spacing=spacing)
    assert_same(DDIM(eta=0.5), theirs, steps, eta=0.5, before=true_strides(theirs, steps))


@pytest.mark.parity
@pytest.mark.parametrize("config", [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"set_alpha_to_one": False},
    {"clip_sample": True},
    {"clip_sample": True, "clip_sample_range": 2.0},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "linear"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("eta", [0.0, 0.9])
def test_configurations(config, eta):
    """With eta 1 and no signal at the start, the reference takes the root of 1 - alpha - (1 - alpha), which is rounded
    to a little less than 0, and so to nan, on some processors; `test_eta_1_is_ddpm` has that corner."""
    assert_same(DDIM(eta=eta), scheduler(**config), 10, eta=eta)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 4, 9])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_from_a_picture(start, eta):
    assert_same(DDIM(eta=eta), scheduler(), 10, start=start, eta=eta)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_eta_1_is_ddpm(spacing, zero_snr):
    """The same noise, and the same share of everything that is not noise."""
    schedule = Schedule(timestep_spacing=spacing, rescale_betas_zero_snr=zero_snr, prediction_type="v_prediction")
    ddim, ddpm = (sampler.table(schedule, 20).steps for sampler in (DDIM(eta=1.0), DDPM()))
    np.testing.assert_allclose(ddim.coefficients["noise"], ddpm.coefficients["noise"], atol=1e-12)
    eps = ddpm.coefficients["x"] * ddpm.sigma  # x = alpha x0 + sigma eps
    np.testing.assert_allclose(ddim.coefficients["towards"], eps, atol=1e-12)
    x0 = ddpm.coefficients["x0"] + ddpm.coefficients["x"] * ddpm.alpha
    np.testing.assert_allclose(ddim.alpha_next, x0, atol=1e-12)
