"""What is written into a picture about how it was made."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sfumato.controls import CFG, Control
from sfumato.model import Model
from sfumato.plan import Plan
from sfumato.samplers import SAMPLERS, Sampler
from sfumato.version import __version__


def record(
    model: Model, plan: Plan, sampler: Sampler, steps: int, controls: Sequence[Control], strength: float | None,
    clip_skip: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """The metadata of every picture: prompt, settings, model, controls, versions."""
    guidance = [float(control.scale) for control in controls if isinstance(control, CFG)]
    shared: dict[str, Any] = {
        "sampler": sampler_name(sampler), "steps": steps, "size": list(plan.size), "dtype": model.dtype,
        "prediction": model.schedule.prediction_type,
    }  # fmt: skip
    if guidance:
        shared["guidance"] = guidance[0]
    if strength is not None:
        shared["strength"] = strength
    if clip_skip:
        shared["clip_skip"] = clip_skip
    common = {
        "model": model.name,
        **({"adapters": list(model.adapters)} if model.adapters else {}),
        "family": str(model.family),
        "controls": [describe(control) for control in controls],
        "versions": {"sfumato": __version__, "jax": jax.__version__},
    }
    return [
        {"prompt": prompt, "negative": negative, "settings": shared | {"seed": seed}, **common}
        for prompt, negative, seed in zip(plan.prompts, plan.negatives, plan.seeds, strict=True)
    ]


def sampler_name(sampler: Sampler) -> str:
    """The name in `SAMPLERS` that gives this sampler, otherwise that of its class."""
    return next((name for name, make in SAMPLERS.items() if make() == sampler), type(sampler).__name__)


def describe(value: Any) -> dict[str, Any] | str:
    """A control by its name and its plain settings; pictures and networks only by their kind."""
    settings = {field.name: _plain(getattr(value, field.name)) for field in dc.fields(value)}
    return {"name": type(value).__name__, **{key: one for key, one in settings.items() if one is not None}}


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dc.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dc.fields(value)}
    if isinstance(value, np.ndarray | jax.Array) and np.ndim(value) == 0:
        return float(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) and len(value) < 20:
        return [_plain(one) for one in value]
    return type(value).__name__
