"""Whole runs with every sampler against the torch pipelines, stochastic ones with the same noise in every row."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import pytest

from sfumato.samplers import NAMES, DDIMInverse, DPMpp2SAncestral, Sampler, sampler

from runs import noise
from samplers.oracle import scheduler_class

STEPS = 6


@dc.dataclass(frozen=True)
class Run:
    """A sampler as the reference has it."""

    scheduler: str
    """Its class, without "Scheduler"."""
    config: Mapping[str, Any] = dc.field(default_factory=dict)
    settings: Mapping[str, Any] = dc.field(default_factory=dict)
    """What the pipeline is called with."""
    second: bool = False
    """Whether it draws noise in every second row of ours alone."""
    own: Sampler | None = None
    """Our sampler; None is what the configuration means."""


SAMPLERS = {
    "ddim": Run("DDIM"),
    "ddim, eta": Run("DDIM", settings={"eta": 0.7}, own=NAMES["ddim"](eta=0.7)),
    "ddim inverse": Run("DDIMInverse", own=DDIMInverse()),
    "ddpm": Run("DDPM"),
    "pndm": Run("PNDM", {"skip_prk_steps": True}),
    "lms": Run("LMSDiscrete"),
    "euler": Run("EulerDiscrete"),
    "euler a": Run("EulerAncestralDiscrete"),
    "heun": Run("HeunDiscrete"),
    "dpm2": Run("KDPM2Discrete"),
    "dpm2 a": Run("KDPM2AncestralDiscrete", second=True),
    "dpm++ 2s": Run("DPMSolverSinglestep"),
    "dpm++ 2s a": Run("DPMpp2SAncestral", second=True, own=DPMpp2SAncestral()),
    "dpm++ 2m": Run("DPMSolverMultistep"),
    "dpm++ sde": Run("DPMSolverSDE"),
    "dpm++ 2m sde": Run("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}),
    "deis": Run("DEISMultistep"),
    "unipc": Run("UniPCMultistep"),
    "lcm": Run("LCM"),
    "tcd": Run("TCD", settings={"eta": 0.3}),
}

COMMON = ["ddim", "pndm", "euler", "euler a", "heun", "dpm++ 2m", "dpm++ 2m sde", "unipc"]
RUNS = [("sd1", name) for name in SAMPLERS] + [
    (kind, name) for kind in ("sd2", "sdxl") for name in COMMON
    # The reference mixes velocities of different times, we mix noise: see sfumato.samplers.pndm.
    if (kind, name) != ("sd2", "pndm")
]  # fmt: skip


def test_every_sampler_is_here():
    assert SAMPLERS.keys() >= NAMES.keys() - {"plms"}


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "name"), RUNS)
def test_samplers(kind, name, pair):
    run = SAMPLERS[name]
    both = pair(kind, small=True)
    both = both.scheduled(scheduler_class(run.scheduler).from_config(both.pipeline.scheduler.config, **run.config))
    chosen = sampler(run.own, both.model.schedule)
    rows = noise((len(chosen.table(both.model.schedule, STEPS).steps.t), 1, 8, 8, 4), seed=9)
    want = both.theirs(steps=STEPS, rows=rows[1::2] if run.second else rows, **run.settings)
    both.assert_same(both.ours(steps=STEPS, sampler=chosen, noise=rows), want)
