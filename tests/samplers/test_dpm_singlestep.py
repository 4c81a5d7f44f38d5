"""Singlestep DPM-Solver against the torch reference."""

from __future__ import annotations

import functools

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpm_singlestep import DPMSinglestep
from sfumato.samplers.sigmas import KINDS

from samplers.multistep import assert_equal

parity = pytest.mark.parity
assert_equal = functools.partial(assert_equal, DPMSinglestep, "DPMSolverSinglestep")


@parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
@pytest.mark.parametrize("sigmas", KINDS)
def test_noise_levels(sigmas, steps):
    assert_equal(steps, sigmas=sigmas)


@parity
@pytest.mark.parametrize("steps", [4, 5, 6, 24])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(order, solver, final, lower, steps):
    assert_equal(steps, solver_order=order, solver_type=solver, final_sigmas_type=final, lower_order_final=lower)


@parity
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_space(order, solver):
    assert_equal(10, solver_order=order, solver_type=solver, algorithm_type="dpmsolver", final_sigmas_type="sigma_min")


@parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
def test_predictions(prediction):
    assert_equal(10, prediction_type=prediction)


@parity
@pytest.mark.parametrize("start", [1, 2, 4, 5, 8, 9])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_a_picture(order, start):
    assert_equal(10, start=start, solver_order=order)


def test_bad_settings():
    with pytest.raises(SfumatoError, match="order"):
        DPMSinglestep(order=4)
    with pytest.raises(SfumatoError, match="sde-dpmsolver"):
        DPMSinglestep.from_options({"algorithm_type": "sde-dpmsolver++"})
