"""LCM sampling against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.lcm import LCM
from sfumato.schedule import Schedule

from samplers.oracle import assert_same


def scheduler(**config):
    from diffusers import LCMScheduler

    return LCMScheduler(**config)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 25, 50])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_steps(prediction, steps):
    assert_same(LCM(), scheduler(prediction_type=prediction), steps)


@pytest.mark.parity
@pytest.mark.parametrize("config", [
    {"original_inference_steps": 100}, {"timestep_scaling": 1.0}, {"clip_sample": True},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
], ids=str)  # fmt: skip
def test_configurations(config):
    assert_same(LCM(), scheduler(**config), 4)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 3])
def test_from_a_picture(start):
    assert_same(LCM(), scheduler(), 4, start=start)


@pytest.mark.parametrize("steps", [0, 51])
def test_too_many_steps(steps):
    with pytest.raises(SfumatoError, match=f"in 1 to 50 steps, not in {steps}"):
        LCM().table(Schedule(), steps)
