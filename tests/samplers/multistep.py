"""What the tests of DPM-Solver, DEIS and UniPC share: cases, schedulers of the reference, and the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest

from sfumato.samplers.base import Sampler
from sfumato.schedule import SPACINGS

from samplers.oracle import SD, assert_same, scheduler_class

FLAGS = {"native": {}, "lu": {"use_lu_lambdas": True}} | {
    kind: {f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")
}
Case = dict[str, Any]
"""Arguments of `assert_equal`."""


def grid(**values: Any) -> list[Case]:
    """All combinations of the values in these lists; what is no list has one value."""
    lists = [value if isinstance(value, list | tuple) else [value] for value in values.values()]
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*lists)]


def shared(levels: Sequence[str], **from_a_picture: Any) -> dict[str, list[Case]]:
    """Groups of cases that all of these samplers have, with all noise levels that this one has."""
    return {
        "noise levels": grid(sigmas=levels, timestep_spacing=SPACINGS, steps=[1, 2, 3, 4, 10, 25], steps_offset=1),
        "predictions": grid(sigmas=levels, prediction_type=["v_prediction", "sample"]),
        "from a picture": grid(solver_order=[1, 2, 3], start=[1, 4, 8, 9], **from_a_picture),
    }


def zero_snr(levels: Sequence[str]) -> list[Case]:
    return grid(
        sigmas=levels, timestep_spacing=SPACINGS, prediction_type="v_prediction", rescale_betas_zero_snr=True
    )  # fmt: skip


def over(groups: dict[str, list[Case]]) -> Any:
    """A parity test of all these cases, one by one."""
    named = [(f"{group}-{'-'.join(map(str, case.values()))}", case) for group in groups for case in groups[group]]
    return pytest.mark.parametrize("case", [pytest.param(case, id=id, marks=pytest.mark.parity) for id, case in named])


def scheduler(name: str, sigmas: str = "native", **config: Any) -> Any:
    """diffusers' `name`Scheduler."""
    return scheduler_class(name)(**SD, **FLAGS[sigmas], **config)


def assert_equal(kind: type[Sampler], name: str, steps: int = 10, *, start: int = 0, tol: float = 1e-4, **config: Any):
    """The sampler that a configuration means goes where the reference's goes.

    Of exponential and beta levels diffusers cuts off what follows the point of a timestep, and the first comes out as
    998.9999 by a rounding error in float32. Ours is 999, so that is what both are told here.
    """
    theirs = scheduler(name, **config)
    theirs.set_timesteps(steps)
    times = theirs.timesteps.numpy().copy()
    if config.get("sigmas") in ("exponential", "beta"):
        assert times[0] in (998, 999)
        times[0] = 999
    assert_same(kind.from_options(theirs.config), theirs, steps, start=start, tol=tol, timesteps=times[start:])
