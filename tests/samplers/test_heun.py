"""Heun against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.samplers.heun import Heun

from samplers.oracle import CASES, SD, assert_same

pytestmark = pytest.mark.parity


def scheduler(kind: str = "native", **config):
    from diffusers import HeunDiscreteScheduler

    return HeunDiscreteScheduler(**SD, **({} if kind == "native" else {f"use_{kind}_sigmas": True}), **config)


@pytest.mark.parametrize(("kind", "spacing", "steps"), CASES)
def test_noise_levels(kind, spacing, steps):
    assert_same(Heun(kind), scheduler(kind, timestep_spacing=spacing, steps_offset=1), steps)


@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_predictions(prediction):
    assert_same(Heun(), scheduler(prediction_type=prediction), 10)


@pytest.mark.parametrize("start", [1, 4, 9])
@pytest.mark.parametrize("kind", ["native", "karras"])
def test_from_a_picture(kind, start):
    assert_same(Heun(kind), scheduler(kind), 10, start=start)
