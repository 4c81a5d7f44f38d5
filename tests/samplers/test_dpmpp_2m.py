"""DPM-Solver++(2M) against the torch reference, and its laws."""

from __future__ import annotations

import functools

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_2m import DPMpp2M
from sfumato.samplers.exponential import LEVELS
from sfumato.schedule import SPACINGS

from samplers.multistep import assert_equal

parity = pytest.mark.parity


assert_equal = functools.partial(assert_equal, DPMpp2M, "DPMSolverMultistep")


@parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", LEVELS)
def test_noise_levels(sigmas, spacing, steps):
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(order, solver, final, steps):
    assert_equal(steps, solver_order=order, solver_type=solver, final_sigmas_type=final)


@parity
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_noise_space(solver, order, steps):
    assert_equal(
        steps, algorithm_type="dpmsolver", solver_order=order, solver_type=solver, final_sigmas_type="sigma_min"
    )


@parity
@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("euler", [False, True])
@pytest.mark.parametrize("order", [2, 3])
def test_ends(order, euler, lower, steps):
    assert_equal(
        steps, solver_order=order, euler_at_final=euler, lower_order_final=lower, final_sigmas_type="sigma_min"
    )


@parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sigmas", LEVELS)
def test_predictions(sigmas, prediction):
    assert_equal(10, sigmas=sigmas, prediction_type=prediction)


@parity
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", LEVELS)
def test_zero_snr(sigmas, spacing):
    assert_equal(
        10, sigmas=sigmas, timestep_spacing=spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )


@parity
@pytest.mark.parametrize("start", [1, 4, 8, 9])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_a_picture(order, start):
    assert_equal(10, start=start, solver_order=order, sigmas="karras")


def test_bad_settings():
    for settings in ({"order": 4}, {"order": 0}, {"solver": "logrho"}, {"space": "v"}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            DPMpp2M(**settings)
    for options in ({"thresholding": True}, {"use_flow_sigmas": True}, {"lambda_min_clipped": -5.1}):
        with pytest.raises(SfumatoError, match=next(iter(options))):
            DPMpp2M.from_options(options)
