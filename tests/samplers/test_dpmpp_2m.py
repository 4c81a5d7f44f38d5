"""DPM-Solver++(2M) against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.dpmpp_2m import DPMpp2M
from sfumato.samplers.exponential import LEVELS

from samplers.multistep import assert_equal, grid, over, shared, zero_snr

ORDERS, SOLVERS, EITHER = [1, 2, 3], ["midpoint", "heun"], [False, True]


@over({
    **shared(LEVELS, sigmas="karras"),
    "zero-SNR": zero_snr(LEVELS),
    "orders": grid(
        solver_order=ORDERS, solver_type=SOLVERS, final_sigmas_type=["zero", "sigma_min"], steps=[4, 10, 25]
    ),
    "noise space": grid(
        algorithm_type="dpmsolver", solver_type=SOLVERS, solver_order=ORDERS, final_sigmas_type="sigma_min",
        steps=[4, 10, 25],
    ),
    "ends": grid(
        solver_order=[2, 3], euler_at_final=EITHER, lower_order_final=EITHER, final_sigmas_type="sigma_min",
        steps=[4, 25],
    ),
})  # fmt: skip
def test_parity(case):
    assert_equal(DPMpp2M, "DPMSolverMultistep", **case)


def test_bad_settings():
    for settings in ({"order": 4}, {"order": 0}, {"solver": "logrho"}, {"space": "v"}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            DPMpp2M(**settings)
    for options in ({"thresholding": True}, {"use_flow_sigmas": True}, {"lambda_min_clipped": -5.1}):
        with pytest.raises(SfumatoError, match=next(iter(options))):
            DPMpp2M.from_options(options)
