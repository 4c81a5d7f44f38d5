"""DDPM against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.ddpm import DDPM
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import SD, assert_same


def scheduler(**config):
    from diffusers import DDPMScheduler

    return DDPMScheduler(**{**SD, "clip_sample": False, **config})


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10, 25, 30])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps(spacing, steps):
    assert_same(DDPM(), scheduler(timestep_spacing=spacing), steps)


@pytest.mark.parity
@pytest.mark.parametrize("config", [
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample", "steps_offset": 1},
    {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    {"clip_sample": True, "clip_sample_range": 2.0},
], ids=str)  # fmt: skip
def test_configurations(config):
    assert_same(DDPM(), scheduler(**config), 10)


@pytest.mark.parity
def test_large_variance():
    """diffusers leaves out the last noise only at timestep 0, where leading spacing without offset ends."""
    assert_same(DDPM("fixed_large"), scheduler(variance_type="fixed_large"), 10)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 9])
def test_from_a_picture(start):
    assert_same(DDPM(), scheduler(), 10, start=start)


def test_the_last_step_is_without_noise():
    for variance in ("fixed_small", "fixed_large"):
        steps = DDPM(variance).table(Schedule(timestep_spacing="trailing"), 10).steps
        assert steps.coefficients["noise"][-1] == 0 < steps.coefficients["noise"][:-1].min()
    with pytest.raises(SfumatoError, match="variance 'learned'"):
        DDPM("learned").table(Schedule(), 10)
