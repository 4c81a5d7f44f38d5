"""DPM-Solver++(2S) ancestral against k-diffusion's formula, written out here in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_2s_ancestral import DPMpp2SAncestral
from sfumato.samplers.dpmpp_sde import DPMppSDE
from sfumato.samplers.sigmas import KINDS, sigma_schedule, timestep_of
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import NOISE, PICTURE, SHAPE, draws, network, run_ours

NOISE_OF_ROWS = draws(100)


def formula(schedule, steps, eta, s_noise, kind, start, y):
    """`y` is x / alpha, as all of k-diffusion; time is -log of the noise ratio."""
    t, r = sigma_schedule(schedule, steps, kind=kind, final="zero")

    def denoise(y, r, t):
        x = y / np.sqrt(1 + r**2)
        eps = network(x, t)
        if schedule.prediction_type == "v_prediction":
            return (x - r * eps) / np.sqrt(1 + r**2)
        return y - r * eps

    for i in range(start, steps):
        clean = denoise(y, r[i], t[i])
        if r[i + 1] == 0:
            return clean
        up = min(r[i + 1], eta * np.sqrt(r[i + 1] ** 2 * (r[i] ** 2 - r[i + 1] ** 2) / r[i] ** 2))
        down = np.sqrt(r[i + 1] ** 2 - up**2)
        h = np.log(r[i]) - np.log(down)
        middle = np.exp(np.log(r[i]) - h / 2)
        halfway = middle / r[i] * y - np.expm1(-h / 2) * clean
        clean = denoise(halfway, middle, timestep_of(schedule, np.array([middle]))[0])
        y = down / r[i] * y - np.expm1(-h) * clean
        y = y + NOISE_OF_ROWS[2 * i + 1] * s_noise * up
    raise AssertionError


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_formula(prediction, kind, eta, steps):
    schedule = Schedule(prediction_type=prediction)
    sampler = DPMpp2SAncestral(sigmas=kind, eta=eta, s_noise=0.9)
    _, r = sigma_schedule(schedule, steps, kind=kind, final="zero")
    ours = run_ours(sampler, schedule, steps)
    np.testing.assert_allclose(ours, formula(schedule, steps, eta, 0.9, kind, 0, r[0] * NOISE), atol=1e-9)


@pytest.mark.parametrize("start", [1, 4, 9])
def test_from_a_picture(start):
    schedule = Schedule()
    _, r = sigma_schedule(schedule, 10, final="zero")
    ours = run_ours(DPMpp2SAncestral(), schedule, 10, start=start, picture=PICTURE)
    theirs = formula(schedule, 10, 1.0, 1.0, "native", start, PICTURE + r[start] * NOISE)
    np.testing.assert_allclose(ours, theirs, atol=1e-9)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_perfect_network(spacing):
    schedule, clean = Schedule(prediction_type="sample", timestep_spacing=spacing), np.full(SHAPE, 0.3)
    ours = run_ours(DPMpp2SAncestral(), schedule, 5, f=lambda x, t: clean)
    np.testing.assert_allclose(ours, clean, atol=1e-12)


def test_without_noise_both_samplers_are_one():
    """DPM-Solver++(2S) is what is left of this one and of DPM++ SDE."""
    first, second = (run_ours(kind(eta=0.0), Schedule(), 8) for kind in (DPMpp2SAncestral, DPMppSDE))
    np.testing.assert_allclose(first, second, rtol=1e-12, atol=1e-12)


def test_zero_snr_is_finite():
    schedule = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert np.isfinite(run_ours(DPMpp2SAncestral(), schedule, 5)).all()


def test_bad_settings():
    with pytest.raises(SfumatoError, match="eta"):
        DPMpp2SAncestral(eta=2.0).table(Schedule(), 5)
    with pytest.raises(SfumatoError, match="spacing"):
        DPMpp2SAncestral(sigmas="lu")
