"""DDIM inversion against the torch reference, and against DDIM."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.samplers.ddim import DDIM
from sfumato.samplers.ddim_inverse import DDIMInverse
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import NOISE, PICTURE, SD, assert_same, run_ours


@pytest.mark.parity
@pytest.mark.parametrize("steps", [1, 4, 10, 25])
@pytest.mark.parametrize("config", [
    {}, {"timestep_spacing": "trailing"}, {"prediction_type": "v_prediction"}, {"set_alpha_to_one": False},
    {"clip_sample": True},
], ids=str)  # fmt: skip
def test_parity(config, steps):
    from diffusers import DDIMInverseScheduler

    config = {**SD, "clip_sample": False, "steps_offset": 1, **config}
    assert_same(DDIMInverse(), DDIMInverseScheduler(**config), steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_undoes_ddim(spacing, steps):
    """Exactly so if the noise that the network sees depends on the timestep alone; its rows are DDIM's backwards."""
    schedule = Schedule(timestep_spacing=spacing, steps_offset=1)
    there, back = (sampler.table(schedule, steps).steps for sampler in (DDIMInverse(), DDIM()))
    np.testing.assert_array_equal(there.t, back.t[::-1])
    np.testing.assert_array_equal(there.alpha_next, back.alpha[::-1])
    np.testing.assert_array_equal(there.alpha, back.alpha_next[::-1])

    def f(x, t):
        return np.cos(NOISE * t)

    noise = run_ours(DDIMInverse(), schedule, steps, f=f, picture=PICTURE)
    # Row 0 of the inversion sees the picture itself; run_ours noises it to that row's level, which is none.
    x, table = noise, DDIM().table(schedule, steps).steps
    for t, a, s, b, r in zip(table.t, table.alpha, table.sigma, table.alpha_next, table.sigma_next, strict=True):
        eps = f(x, t)
        x = b * (x - s * eps) / a + r * eps
    np.testing.assert_allclose(x, PICTURE, atol=1e-9)
