"""UniPC against the torch reference."""

from __future__ import annotations

import functools

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.sigmas import KINDS
from sfumato.samplers.unipc import UniPC
from sfumato.schedule import SPACINGS

from samplers.multistep import assert_equal

parity = pytest.mark.parity
assert_equal = functools.partial(assert_equal, UniPC, "UniPCMultistep")


@parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_noise_levels(sigmas, spacing, steps):
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize(("solver", "final"), [("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min")])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_orders(order, solver, final, steps):
    """But for bh1 that ends without noise, where the reference has 0 times infinity."""
    assert_equal(steps, solver_order=order, solver_type=solver, final_sigmas_type=final)


@parity
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_space(order, solver):
    assert_equal(10, solver_order=order, solver_type=solver, predict_x0=False, final_sigmas_type="sigma_min")


@parity
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("off", [[], [0], [0, 1, 5], list(range(10))])
def test_without_the_corrector(off, lower):
    assert_equal(10, solver_order=3, disable_corrector=off, lower_order_final=lower, final_sigmas_type="sigma_min")


@parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sigmas", KINDS)
def test_predictions(sigmas, prediction):
    assert_equal(10, sigmas=sigmas, prediction_type=prediction)


@parity
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_zero_snr(sigmas, spacing):
    assert_equal(
        10, sigmas=sigmas, timestep_spacing=spacing, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )


@parity
@pytest.mark.parametrize("start", [1, 4, 8, 9])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_a_picture(order, start):
    assert_equal(10, start=start, solver_order=order)


def test_bad_settings():
    for settings in ({"order": 0}, {"solver": "heun"}, {"space": "v"}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            UniPC(**settings)
    with pytest.raises(SfumatoError, match="solver_p"):
        UniPC.from_options({"solver_p": "DDIMScheduler"})
