"""Euler against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.samplers.euler import Euler
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS

from samplers.oracle import CASES, SD, assert_same

pytestmark = pytest.mark.parity


def scheduler(kind: str = "native", **config):
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(**SD, **({} if kind == "native" else {f"use_{kind}_sigmas": True}), **config)


@pytest.mark.parametrize(("kind", "spacing", "steps"), CASES)
def test_noise_levels(kind, spacing, steps):
    theirs = scheduler(kind, timestep_spacing=spacing, steps_offset=1, prediction_type="v_prediction")
    assert_same(Euler(kind), theirs, steps)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_predictions(prediction, kind):
    assert_same(Euler(kind), scheduler(kind, prediction_type=prediction), 10)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_zero_snr_and_the_end(final, spacing):
    theirs = scheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing=spacing, final_sigmas_type=final
    )
    assert_same(Euler(), theirs, 10)


@pytest.mark.parametrize("start", [1, 4, 9])
@pytest.mark.parametrize("kind", ["native", "karras"])
def test_from_a_picture(kind, start):
    assert_same(Euler(kind), scheduler(kind), 10, start=start)
