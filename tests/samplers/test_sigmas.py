"""Noise levels: their laws. That they are the reference's, the samplers' own tests show."""

from __future__ import annotations

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.sigmas import (
    KINDS,
    ancestral,
    curve,
    interleave,
    levels,
    noise_ratio,
    sigma_schedule,
    split,
    start_sigma,
    timestep_of,
    trained_ratios,
)  # fmt: skip
from sfumato.schedule import SPACINGS, Schedule

ZERO = Schedule(rescale_betas_zero_snr=True)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("steps", [1, 2, 10, 100])
def test_curves_run_from_high_to_low(kind, steps):
    r = curve(kind, 14.6, 0.03, steps)
    assert r.shape == (steps,)
    assert (np.diff(r) < 0).all()
    np.testing.assert_allclose([r[0], r[-1]], [14.6, 0.03 if steps > 1 else 14.6], rtol=1e-12)


def test_curves_are_what_they_are_called():
    karras, exponential, beta = (curve(kind, 14.6, 0.03, 9) for kind in KINDS[1:])
    np.testing.assert_allclose(np.diff(karras ** (1 / 7), 2), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(np.log(exponential), 2), 0, atol=1e-12)
    share = (beta - 0.03) / (14.6 - 0.03)
    np.testing.assert_allclose(share + share[::-1], 1, atol=1e-9)  # as many close to one end as to the other
    assert share[4] == pytest.approx(0.5)
    assert share[0] - share[1] < share[3] - share[4]


@pytest.mark.parametrize("schedule", [Schedule(), ZERO, Schedule(beta_schedule="squaredcos_cap_v2")])
def test_timesteps_of_ratios(schedule):
    whole = np.arange(1000.0)
    r = noise_ratio(schedule, whole)
    np.testing.assert_allclose(timestep_of(schedule, r), whole, atol=1e-6)
    np.testing.assert_array_equal(timestep_of(schedule, r, "floor"), whole)
    np.testing.assert_array_equal(timestep_of(schedule, r, "round"), whole)
    between = np.sqrt(r[1:] * r[:-1])
    np.testing.assert_allclose(timestep_of(schedule, between), whole[:-1] + 0.5, atol=1e-6)
    np.testing.assert_array_equal(timestep_of(schedule, np.array([0.0, 1e9])), [0, 999])
    with pytest.raises(SfumatoError, match="rounding of timesteps 'up'"):
        timestep_of(schedule, r, "up")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("span", ["visited", "trained"])
def test_schedules(kind, spacing, span):
    for schedule in (
        Schedule(timestep_spacing=spacing),
        Schedule(timestep_spacing=spacing, rescale_betas_zero_snr=True),
    ):
        for final in ("zero", "sigma_min"):
            t, r = sigma_schedule(schedule, 7, kind=kind, endpoint=span == "visited", span=span, final=final)
            assert (t.shape, r.shape) == ((7,), (8,))
            assert (np.diff(t) < 0).all()
            assert (np.diff(r) <= 0).all()
            assert r[-1] == (0 if final == "zero" else trained_ratios(schedule)[0])
            np.testing.assert_allclose(timestep_of(schedule, r[:-1]), t, atol=0.3)  # sigma_schedule's are linear in r
        if kind != "native" and span == "trained":
            np.testing.assert_allclose(t[[0, -1]], [999, 0], atol=1e-9)


@pytest.mark.parametrize(
    "wrong", [{"kind": "cosine"}, {"span": "all"}, {"final": "one"}, {"whole": "up", "kind": "beta"}]
)
def test_unknown_names(wrong):
    with pytest.raises(SfumatoError, match=f"Unknown .* '{next(iter(wrong.values()))}'; known are"):
        sigma_schedule(Schedule(), 10, **wrong)


def test_the_highest_ratio_is_finite():
    assert trained_ratios(ZERO)[-1] == pytest.approx(4096, rel=1e-3)
    alpha, sigma = split(trained_ratios(ZERO))
    np.testing.assert_allclose(alpha**2 + sigma**2, 1)
    np.testing.assert_allclose(alpha[:-1], ZERO.alphas[:-1])
    assert levels(ZERO, np.array([999.0]), clean=True)[0].tolist() == [0, 1]
    assert levels(ZERO, np.array([999.0]), clean=False)[0][1] == ZERO.alphas[0]


def test_start():
    assert start_sigma(Schedule(timestep_spacing="leading"), 10.0) == 1
    assert start_sigma(Schedule(), 3.0) == start_sigma(Schedule(timestep_spacing="trailing"), 3.0) == 3 / 10**0.5


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral(eta):
    r = np.array([10.0, 4.0, 1.0, 0.0])
    down, up = ancestral(r, eta)
    np.testing.assert_allclose(down**2 + up**2, r[1:] ** 2)
    np.testing.assert_allclose(up, eta * r[1:] * np.sqrt(1 - (r[1:] / r[:-1]) ** 2))
    if eta == 1:  # then what is left of the old noise is what DDPM's posterior mean leaves
        np.testing.assert_allclose(down, r[1:] ** 2 / r[:-1])


def test_interleave():
    assert interleave(np.array([1.0, 2.0, 3.0]), np.array([10.0, 20.0, 30.0])).tolist() == [1, 10, 2, 20, 3]
    assert interleave(np.array([1.0]), np.array([])).tolist() == [1]
