"""One run with our sampler and the same run with the reference's scheduler, around the same make-believe network.

Both see the same noise, in float64 as far as they can. `run_theirs` does what diffusers' pipelines do.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from sfumato.samplers.base import Sampler, Table
from sfumato.samplers.sigmas import KINDS
from sfumato.schedule import SPACINGS, Schedule, to_eps, to_x0
from sfumato.types import Step

from oracle import assert_close

SHAPE = (2, 4, 4, 4)
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CASES = [("native", spacing, steps) for spacing in SPACINGS for steps in (1, 4, 10, 25)] + [
    (kind, spacing, steps) for kind in KINDS[1:] for spacing, steps in zip(SPACINGS, (4, 10, 25), strict=True)
]
"""Noise levels, spacings and numbers of steps, for samplers that have them all."""
Network = Callable[[np.ndarray, float], np.ndarray]


def network(x: np.ndarray, t: float) -> np.ndarray:
    """Smooth, not linear, different at every timestep, and of the size of noise."""
    return np.tanh(0.9 * x + 0.2 * np.sin(3 * x + t / 150)) + 0.1 * np.cos(t / 200 + x)


def draws(count: int, seed: int = 0) -> np.ndarray:
    """Standard normal noise [count B H W C]."""
    return np.random.default_rng(seed).standard_normal((count, *SHAPE))


NOISE, PICTURE = draws(2, 1)
PICTURE = np.tanh(PICTURE)


def rows(table: Table, noise: np.ndarray | None = None) -> Iterator[Step]:
    """The active rows one by one, each with its noise."""
    for index in np.flatnonzero(table.steps.active):
        values = jax.tree.map(lambda column, i=index: jnp.asarray(column[i]), table.steps)  # float32 without x64
        drawn = None if noise is None else jnp.asarray(noise[index])
        yield Step(**{**vars(values), "noise": drawn})


def run_ours(
    sampler: Sampler, schedule: Schedule, steps: int, *, start: int = 0, picture: np.ndarray | None = None,
    f: Network = network, dtype: Any = np.float64,
) -> np.ndarray:  # fmt: skip
    """From pure noise, or from `picture` noised to the level of step `start`."""
    with jax.enable_x64(dtype == np.float64):
        table = sampler.table(schedule, steps, start)
        noise = draws(len(table.steps.t)).astype(dtype) if sampler.stochastic else None
        x, state = jnp.asarray(NOISE * table.start_sigma, dtype), None
        for row in rows(table, noise):
            if state is None:
                x = x if picture is None else jnp.asarray(row.alpha * picture + row.sigma * NOISE, dtype)
                state = sampler.init(x)
            out = jnp.asarray(f(np.asarray(x, np.float64), float(row.t)), dtype)
            x0, eps = (to(out, x, row.alpha, row.sigma, schedule.prediction_type) for to in (to_x0, to_eps))
            x, state = advance(sampler, x, x0, eps, row, state)
            assert x.dtype == dtype
        return np.asarray(x)


@jax.jit(static_argnums=0)
def advance(sampler: Sampler, x: Any, x0: Any, eps: Any, row: Step, state: Any) -> Any:
    return sampler.step(x, x0, eps, row, state)


def run_theirs(
    scheduler: Any, steps: int, *, start: int = 0, picture: np.ndarray | None = None, f: Network = network,
    timesteps: Sequence[float] | None = None, noise_rows: Sequence[int] | None = None,
    before: Callable[[int, float], None] = lambda i, t: None, **settings: Any,
) -> np.ndarray:  # fmt: skip
    """As `run_ours`. `noise_rows[k]` is the row of ours whose noise the k-th draw gets (one a row unless given);
    `timesteps` replaces the scheduler's own, `before(i, t)` is called ahead of every step, and `settings` go to it.
    """
    import torch

    scheduler.set_timesteps(steps)
    first = start * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    times = scheduler.timesteps[first:] if timesteps is None else torch.as_tensor(timesteps)
    if picture is None:
        x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(torch.from_numpy(picture), torch.from_numpy(NOISE), times[:1])
    drawn = iter(draws(4 * steps + 4)[noise_rows if noise_rows is not None else slice(first, None)])
    with drawing(scheduler, drawn):
        for i, t in enumerate(times):
            before(i, float(t))
            told = scheduler.scale_model_input(x, t).numpy()
            out = torch.from_numpy(f(told, float(t)))
            x = scheduler.step(out, t, x, **settings, return_dict=False)[0]
    sigmas = getattr(scheduler, "sigmas", [0.0])
    in_ratio = "sigma" in inspect.getsource(scheduler.scale_model_input)
    return x.numpy() / np.hypot(1, float(sigmas[-1]) if in_ratio else 0.0)


@contextlib.contextmanager
def drawing(scheduler: Any, drawn: Iterator[np.ndarray]) -> Iterator[None]:
    """The scheduler's random numbers come from `drawn`."""
    import torch

    def draw(*_: Any, **__: Any) -> Any:
        return torch.from_numpy(next(drawn))

    module = sys.modules[type(scheduler).__module__]
    replaced = {"randn_tensor": draw, "BrownianTreeNoiseSampler": lambda *_: draw}
    with contextlib.ExitStack() as stack:
        for name in replaced.keys() & vars(module).keys():
            stack.enter_context(mock.patch.object(module, name, replaced[name]))
        yield


def scheduler_class(name: str) -> Any:
    """The reference's scheduler, also those two that diffusers itself does not hand out here."""
    module = importlib.import_module("diffusers")
    if name == "DPMpp2SAncestral":
        module = importlib.import_module("samplers.k_diffusion")
    if name == "DPMSolverSDE":  # asks for torchsde at its import, for the Brownian path that `drawing` replaces
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
        module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    return getattr(module, f"{name}Scheduler")


class Stride:
    """What `num_train_timesteps // num_inference_steps` of a scheduler shall be: the way to the next timestep."""

    def __init__(self, value: float) -> None:
        self.value = int(value)

    def __rfloordiv__(self, other: int) -> int:
        return self.value


def true_strides(scheduler: Any, steps: int) -> Callable[[int, float], None]:
    """For `run_theirs(before=...)`: DDIM and PLMS of diffusers take equal strides, though the timesteps of linspace,
    and of trailing where `steps` does not divide the schedule, are not equally far apart. This corrects them."""
    scheduler.set_timesteps(steps)
    times = sorted({float(t) for t in scheduler.timesteps}, reverse=True)
    strides = dict(zip(times, [a - b for a, b in itertools.pairwise(times)] + [10**6], strict=True))

    def before(i: int, t: float) -> None:
        scheduler.num_inference_steps = Stride(strides[t])

    return before


def assert_same(sampler: Sampler, scheduler: Any, steps: int, *, tol: float = 1e-4, start: int = 0, **theirs: Any):
    """Our latents are the reference's: from noise, or with `start` from a picture, within `tol` of their range."""
    schedule = Schedule.from_config({"_class_name": type(scheduler).__name__, **scheduler.config})
    picture = PICTURE if start else None
    ours = run_ours(sampler, schedule, steps, start=start, picture=picture)
    assert_close(ours, run_theirs(scheduler, steps, start=start, picture=picture, **theirs), tol)
