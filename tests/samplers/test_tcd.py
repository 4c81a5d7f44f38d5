"""TCD sampling against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.samplers.tcd import TCD

from samplers.oracle import assert_same


def scheduler(**config):
    from diffusers import TCDScheduler

    return TCDScheduler(**config)


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 25, 50])
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_steps(eta, steps):
    assert_same(TCD(eta=eta), scheduler(), steps, eta=eta)


@pytest.mark.parity
@pytest.mark.parametrize("config", [
    {"original_inference_steps": 100}, {"prediction_type": "sample"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
], ids=str)  # fmt: skip
def test_configurations(config):
    assert_same(TCD(), scheduler(**config), 4)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 3])
def test_from_a_picture(start):
    assert_same(TCD(), scheduler(), 4, start=start)
