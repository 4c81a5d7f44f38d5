"""SDE-DPM-Solver++(2M) against the torch reference, and its laws."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_2m import DPMpp2M
from sfumato.samplers.dpmpp_2m_sde import DPMpp2MSDE
from sfumato.samplers.exponential import LEVELS
from sfumato.schedule import SPACINGS, Schedule

from samplers.multistep import assert_equal
from samplers.oracle import NOISE, draws, network, run_ours

parity = pytest.mark.parity
assert_equal = functools.partial(assert_equal, DPMpp2MSDE, "DPMSolverMultistep", algorithm_type="sde-dpmsolver++")


@parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", LEVELS)
def test_noise_levels(sigmas, spacing, steps):
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
def test_orders(order, solver, final, steps):
    assert_equal(steps, solver_order=order, solver_type=solver, final_sigmas_type=final)


@parity
@pytest.mark.parametrize("euler", [False, True])
@pytest.mark.parametrize("lower", [False, True])
def test_ends(lower, euler):
    assert_equal(10, euler_at_final=euler, lower_order_final=lower, final_sigmas_type="sigma_min")


@parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_predictions(zero_snr, prediction):
    assert_equal(10, prediction_type=prediction, rescale_betas_zero_snr=zero_snr, timestep_spacing="trailing")


@parity
@pytest.mark.parametrize("start", [1, 4, 8, 9])
def test_from_a_picture(start):
    assert_equal(10, start=start, sigmas="karras")


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_any_eta(solver, eta):
    """The step of k-diffusion's sample_dpmpp_2m_sde, written with y = x / alpha and t = lambda."""
    schedule = Schedule(final_sigmas_type="zero")
    sampler = DPMpp2MSDE(solver=solver, eta=eta, s_noise=0.9, lower_order_final=False)
    rows = sampler.table(schedule, 8).steps
    r, r_next = rows.sigma / rows.alpha, rows.sigma_next / rows.alpha_next
    y, old, h_last, noise = NOISE / rows.alpha[0], None, None, draws(8)
    for i in range(8):
        x = y * rows.alpha[i]
        clean = (x - rows.sigma[i] * network(x, rows.t[i])) / rows.alpha[i]
        if r_next[i] == 0:
            y = clean
            continue
        h = np.log(r[i] / r_next[i])
        faster = h * (1 + eta)
        y = r_next[i] / r[i] * np.exp(-h * eta) * y - np.expm1(-faster) * clean
        if old is not None:
            weight = {"heun": 1 - np.expm1(-faster) / -faster, "midpoint": -np.expm1(-faster) / 2}[solver]
            y = y + weight * h / h_last * (clean - old)
        y = y + 0.9 * r_next[i] * np.sqrt(-np.expm1(-2 * h * eta)) * noise[i]
        old, h_last = clean, h
    np.testing.assert_allclose(run_ours(sampler, schedule, 8), y, atol=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_without_noise_it_is_the_deterministic_one(order):
    ours = run_ours(DPMpp2MSDE(order=order, eta=0.0), Schedule(), 10)
    np.testing.assert_allclose(ours, run_ours(DPMpp2M(order=order), Schedule(), 10), rtol=1e-12, atol=1e-12)


def test_noise_keeps_the_variance():
    """Standard normal data noised to any level are standard normal, and so is what the sampler makes of noise, the
    better the shorter the steps."""

    def variance(steps: int) -> float:
        table = DPMpp2MSDE(order=1, sigmas="exponential").table(Schedule(final_sigmas_type="sigma_min"), steps)
        rows, found = table.steps, 1.0
        for i in range(steps):  # the best estimate of x0 is alpha x
            share = {name: column[i] for name, column in rows.coefficients.items()}
            found = found * (share["x"] + share["m0"] * rows.alpha[i]) ** 2 + share["noise"] ** 2
        return found

    lack = [1 - variance(steps) for steps in (250, 500)]
    assert lack[1] == pytest.approx(0.0123, abs=1e-3)
    assert lack[0] / lack[1] == pytest.approx(2, abs=0.1)


def test_numbers_are_data():
    """Samplers that differ in numbers alone share a compiled program."""
    assert DPMpp2MSDE(eta=0.5, s_noise=1.1) == DPMpp2MSDE()
    assert hash(DPMpp2MSDE(eta=0.5)) == hash(DPMpp2MSDE())


def test_bad_settings():
    with pytest.raises(SfumatoError, match="sde-dpmsolver "):
        DPMpp2MSDE.from_options({"algorithm_type": "sde-dpmsolver"})
    with pytest.raises(SfumatoError, match="order"):
        DPMpp2MSDE(order=4)
