"""DPM2 ancestral against the torch reference."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.dpm2 import DPM2
from sfumato.samplers.dpm2_ancestral import DPM2Ancestral
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import Schedule

from samplers.oracle import CASES, SD, assert_same, run_ours

SECOND = slice(1, None, 2)
"""The rows whose noise is used."""


def scheduler(kind: str = "native", **config):
    from diffusers import KDPM2AncestralDiscreteScheduler

    kinds = {} if kind == "native" else {f"use_{kind}_sigmas": True}
    return KDPM2AncestralDiscreteScheduler(**SD, **kinds, **config)


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "spacing", "steps"), CASES)
def test_noise_levels(kind, spacing, steps):
    theirs = scheduler(kind, timestep_spacing=spacing, steps_offset=1)
    assert_same(DPM2Ancestral(kind), theirs, steps, noise_rows=SECOND)


@pytest.mark.parity
def test_v_prediction():
    assert_same(DPM2Ancestral(), scheduler(prediction_type="v_prediction"), 10, noise_rows=SECOND)


@pytest.mark.parity
@pytest.mark.parametrize("start", [1, 4, 9])
def test_from_a_picture(start):
    assert_same(DPM2Ancestral(), scheduler(), 10, start=start, noise_rows=slice(2 * start + 1, None, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_eta_0_is_dpm2(kind):
    schedule = Schedule()
    ours = run_ours(DPM2Ancestral(kind, eta=0.0), schedule, 10)
    np.testing.assert_allclose(ours, run_ours(DPM2(kind), schedule, 10), atol=1e-12)
