"""DEIS against the torch reference."""

from __future__ import annotations

import functools

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.deis import DEIS
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS

from samplers.multistep import assert_equal

parity = pytest.mark.parity
assert_equal = functools.partial(assert_equal, DEIS, "DEISMultistep")


@parity
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 25])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sigmas", KINDS)
def test_noise_levels(sigmas, spacing, steps):
    if steps == 1 and sigmas != "native":
        return  # the reference ends at the level it starts with
    assert_equal(steps, sigmas=sigmas, timestep_spacing=spacing, steps_offset=1)


@parity
@pytest.mark.parametrize("steps", [4, 10, 25])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(order, lower, steps):
    assert_equal(steps, solver_order=order, lower_order_final=lower)


@parity
@pytest.mark.parametrize("prediction", ["v_prediction", "sample"])
@pytest.mark.parametrize("sigmas", KINDS)
def test_predictions(sigmas, prediction):
    assert_equal(10, sigmas=sigmas, prediction_type=prediction)


@parity
@pytest.mark.parametrize("start", [1, 4, 8, 9])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_from_a_picture(order, start):
    assert_equal(10, start=start, solver_order=order)


def test_bad_settings():
    for settings in ({"order": 4}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            DEIS(**settings)
