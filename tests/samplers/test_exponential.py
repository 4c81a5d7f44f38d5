"""The mathematics of exponential integrators, and the laws of the samplers that are made of it."""

from __future__ import annotations

import dataclasses as dc
import itertools

import numpy as np
import pytest

from sfumato.samplers import exponential
from sfumato.samplers.deis import DEIS
from sfumato.samplers.dpm_singlestep import DPMSinglestep
from sfumato.samplers.dpmpp_2m import DPMpp2M
from sfumato.samplers.unipc import UniPC
from sfumato.schedule import SPACINGS, Schedule

from samplers.oracle import PICTURE, run_ours

ORDERS, SPACES = (1, 2, 3), exponential.SPACES
ALL = [
    *(
        DPMpp2M(order, space, solver)
        for order, space, solver in itertools.product(ORDERS, SPACES, ("midpoint", "heun"))
    ),
    *(DPMSinglestep(order, space) for order, space in itertools.product(ORDERS, SPACES)),
    *(DEIS(order) for order in ORDERS),
    *(UniPC(order, space, solver) for order, space, solver in itertools.product(ORDERS, SPACES, ("bh1", "bh2"))),
]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("h", [1e-3, 0.1, 1.0, 7.0])
def test_moments_are_integrals(h, space):
    points, mass = np.polynomial.legendre.leggauss(60)
    u, mass = (points + 1) * h / 2, mass * h / 2
    kernel = np.exp(u - h) if space == "x0" else np.exp(-u)
    integrals = [float(mass @ (kernel * u**k)) / (1, 1, 2, 6)[k] for k in range(4)]
    np.testing.assert_allclose(exponential.moments(h, 4, space), integrals, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_weights_integrate_polynomials(count):
    nodes = np.array([0.0, -0.3, -0.7, -1.5])[:count]
    weights = exponential.weights(nodes, exponential.moments(0.4, count))
    for k in range(count):
        assert weights @ nodes**k / (1, 1, 2, 6)[k] == pytest.approx(exponential.moments(0.4, 4)[k], abs=1e-14)


def test_orders():
    lam = np.arange(7.0)
    assert exponential.orders(lam, 0, 3).tolist() == [1, 2, 3, 3, 3, 3]
    assert exponential.orders(lam, 2, 3, (2, 1)).tolist() == [1, 1, 1, 2, 2, 1]
    assert exponential.orders(lam, 5, 3, (2, 1)).tolist() == [1, 1, 1, 1, 1, 1]
    assert exponential.orders(lam[:2], 0, 3, (2, 1)).tolist() == [1]
    assert exponential.orders(np.array([0.0, 1, 2, 2, 3, 4]), 0, 3).tolist() == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("sampler", ALL, ids=repr)
@pytest.mark.parametrize(("steps", "start"), [(1, 0), (2, 0), (2, 1), (3, 0), (10, 0), (10, 4), (20, 19)])
def test_a_perfect_network(sampler, steps, start):
    """The run ends at what the network says, or at that with as much noise as the run leaves (DEIS)."""
    schedule = Schedule(prediction_type="sample", timestep_spacing="trailing")
    ours = run_ours(sampler, schedule, steps, start=start, picture=PICTURE, f=lambda x, t: PICTURE)
    end = sampler.table(schedule, steps).steps
    noise = ours - PICTURE * end.alpha_next[-1]
    np.testing.assert_allclose(noise, 0, atol=1e-9 + 4 * end.sigma_next[-1])
    assert end.sigma_next[-1] == 0 or isinstance(sampler, DEIS)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
@pytest.mark.parametrize("sigmas", exponential.LEVELS)
def test_all_rows_are_finite(sampler, sigmas):
    """Also those before the start, at zero terminal SNR, for a final level that comes twice, and where rounding makes
    two timesteps one."""
    sampler = dc.replace(sampler, sigmas=sigmas)
    for final, zero, spacing in itertools.product(("zero", "sigma_min"), (False, True), SPACINGS):
        schedule = Schedule(final_sigmas_type=final, rescale_betas_zero_snr=zero, timestep_spacing=spacing)
        for steps, start in ((1, 0), (2, 1), (12, 5), (30, 0)):
            columns = sampler.table(schedule, steps, start).steps.coefficients
            assert all(np.isfinite(column).all() for column in columns.values())
    if sigmas == "native":
        columns = sampler.table(Schedule(), 1000).steps.coefficients
        assert all(np.isfinite(column).all() for column in columns.values())


EXPECTED = {
    DPMpp2M(1): 1, DPMpp2M(2): 2, DPMpp2M(2, solver="heun"): 2, DPMpp2M(2, "eps"): 2, DPMpp2M(3): 2, DEIS(1): 1,
    DEIS(2): 2, DEIS(3): 3, UniPC(1): 2, UniPC(2): 3, UniPC(2, solver="bh1"): 3, UniPC(2, "eps"): 3, UniPC(3): 4,
    UniPC(3, "eps"): 4, DPMSinglestep(1): 1, DPMSinglestep(2): 2, DPMSinglestep(3): 3,
    DPMSinglestep(3, solver="heun"): 3,
}  # fmt: skip
"""The global order of convergence. UniPC's corrector adds one; the halved moment keeps DPM-Solver++(3M) at two."""


@pytest.fixture(scope="module")
def limit():
    return converged(UniPC(3), 2000)


def converged(sampler, steps):
    """A smooth autonomous equation, with even steps of lambda, to the lowest noise."""
    schedule = Schedule(prediction_type="sample", final_sigmas_type="sigma_min")
    schedule = dc.replace(schedule, num_train_timesteps=4000, beta_start=0.00085 / 4, beta_end=0.012 / 4)
    sampler = dc.replace(sampler, sigmas="exponential", lower_order_final=False)
    return run_ours(sampler, schedule, steps, f=lambda x, t: np.tanh(1.3 * x))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", EXPECTED, ids=repr)
def test_order_of_convergence(sampler, limit):
    """Half the step divides the error by 2 to the order."""
    errors = [np.abs(converged(sampler, steps) - limit).max() for steps in (49, 97)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(EXPECTED[sampler], abs=0.4)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_float32_is_enough(sampler):
    """The coefficients do not amplify rounding errors, and those in x0 not even at zero terminal SNR."""
    zero = getattr(sampler, "space", "eps") == "x0"
    schedule = Schedule(prediction_type="v_prediction", rescale_betas_zero_snr=zero, timestep_spacing="trailing")
    single, double = (run_ours(sampler, schedule, 20, dtype=dtype) for dtype in (np.float32, np.float64))
    assert np.abs(single - double).max() < 2e-6 * np.ptp(double)
