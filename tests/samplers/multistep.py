"""What the tests of DPM-Solver, DEIS and UniPC share: their schedulers in the reference, and one comparison."""

from __future__ import annotations

from typing import Any

from sfumato.samplers.base import Sampler

from samplers.oracle import SD, assert_same

FLAGS = {"native": {}, "lu": {"use_lu_lambdas": True}} | {
    kind: {f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta")
}


def scheduler(name: str, sigmas: str = "native", **config: Any) -> Any:
    """diffusers' `name`MultistepScheduler, or what else it is called."""
    import diffusers

    return getattr(diffusers, f"{name}Scheduler")(**SD, **FLAGS[sigmas], **config)


def assert_equal(kind: type[Sampler], name: str, steps: int, *, start: int = 0, tol: float = 1e-4, **config: Any):
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
