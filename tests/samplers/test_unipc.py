"""UniPC against the torch reference."""

from __future__ import annotations

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers.sigmas import KINDS
from sfumato.samplers.unipc import UniPC

from samplers.multistep import assert_equal, grid, over, shared, zero_snr

# bh1 that ends without noise is missing: the reference has 0 times infinity there.
ENDS = [("bh2", "zero"), ("bh2", "sigma_min"), ("bh1", "sigma_min")]
OFF = [[], [0], [0, 1, 5], list(range(10))]


@over({
    **shared(KINDS),
    "zero-SNR": zero_snr(KINDS),
    "orders": [case for solver, final in ENDS for case in grid(
        solver_order=[1, 2, 3, 4], solver_type=solver, final_sigmas_type=final, steps=[4, 10, 25]
    )],
    "noise space": grid(
        solver_order=[1, 2, 3], solver_type=["bh1", "bh2"], predict_x0=False, final_sigmas_type="sigma_min"
    ),
    "without the corrector": grid(
        disable_corrector=OFF, lower_order_final=[False, True], solver_order=3, final_sigmas_type="sigma_min"
    ),
})  # fmt: skip
def test_parity(case):
    assert_equal(UniPC, "UniPCMultistep", **case)


def test_bad_settings():
    for settings in ({"order": 0}, {"solver": "heun"}, {"space": "v"}, {"sigmas": "nice"}):
        with pytest.raises(SfumatoError):
            UniPC(**settings)
    with pytest.raises(SfumatoError, match="solver_p"):
        UniPC.from_options({"solver_p": "DDIMScheduler"})
