"""DEIS against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.deis import DEIS
from sfumato.samplers.sigmas import KINDS

from samplers.multistep import assert_equal, grid, over, shared

CASES = shared(KINDS) | {"orders": grid(solver_order=[1, 2, 3], lower_order_final=[False, True], steps=[4, 10, 25])}


def ends_where_it_starts(case):
    """Where the reference takes one step, from a noise level to itself."""
    return case.get("steps") == 1 and case["sigmas"] != "native"


@over({group: [case for case in cases if not ends_where_it_starts(case)] for group, cases in CASES.items()})
def test_parity(case):
    assert_equal(DEIS, "DEISMultistep", **case)


def test_bad_settings():
    for settings in ({"order": 4}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            DEIS(**settings)
