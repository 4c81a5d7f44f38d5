"""optax's optimizers and schedules by name, for command lines and configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from sfumato.errors import SfumatoError


def optimizer(
    name: str = "adamw", rate: float = 1e-4, *, steps: int, schedule: str = "constant", warmup: int = 0,
    options: Mapping[str, Any] | None = None, schedule_options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The optimizer of optax (or optax.contrib) of this name, with its own `options` such as b1 or weight_decay.

    The learning rate follows `schedule` (see `schedule_of`). Raises SfumatoError for names and options that optax
    does not have.
    """
    rates = schedule_of(schedule, rate, steps, warmup, schedule_options)
    made = _called(name, optimizers(), {"learning_rate": rates}, options)
    return optax.with_extra_args_support(made)


def schedule_of(
    name: str, rate: float, steps: int, warmup: int = 0, options: Mapping[str, Any] | None = None
) -> optax.Schedule:
    """The schedule of optax of this name: "constant", "linear", "cosine", or any of its functions.

    It takes `warmup` steps up to `rate`, and the others down to 0 unless `options` say something else.
    """
    known = schedules()
    short = (name, f"{name}_schedule", f"{name}_decay", f"{name}_decay_schedule")
    full = next((each for each in short if each in known), name)
    after = max(1, steps - warmup)
    given = {"value": rate, "init_value": rate, "decay_steps": after, "transition_steps": after, "end_value": 0.0}
    if full.startswith("warmup_"):
        given |= {"init_value": 0.0, "peak_value": rate, "warmup_steps": warmup, "decay_steps": steps}
        warmup = 0
    given |= {"linear_onecycle_schedule": {"peak_value": rate}, "polynomial_schedule": {"power": 1}}.get(full, {})
    follow = _called(full, known, given, options)
    if warmup == 0:
        return follow
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), follow], [warmup])


def optimizers() -> dict[str, Callable[..., Any]]:
    """All optimizers of optax by name."""
    return _functions(lambda name, parameters: "learning_rate" in parameters, optax.contrib, optax)


def schedules() -> dict[str, Callable[..., Any]]:
    """All schedules of optax by name."""
    return _functions(lambda name, parameters: name.endswith(("_schedule", "_decay")) and parameters, optax)


def _functions(wanted: Callable[[str, Any], Any], *modules: Any) -> dict[str, Callable[..., Any]]:
    found = {}
    for module in modules:
        for name, value in vars(module).items():
            if inspect.isfunction(value) and not name.startswith("_") and wanted(name, _parameters(value)):
                found[name] = value
    return found


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(function).parameters


def _called(
    name: str, known: Mapping[str, Callable[..., Any]], given: Mapping[str, Any], options: Mapping[str, Any] | None
) -> Any:
    """The function of this name with `options`, and with what of `given` it takes."""
    if name not in known:
        raise SfumatoError(f"optax has no {name!r}; it has {', '.join(sorted(known))}.")
    takes = _parameters(known[name])
    for option in options or ():
        if option not in takes:
            raise SfumatoError(f"{name} has no option {option!r}; it has {', '.join(takes)}.")
    arguments = {key: value for key, value in given.items() if key in takes} | dict(options or {})
    missing = [key for key, value in takes.items() if value.default is value.empty and key not in arguments]
    if missing:
        raise SfumatoError(f"{name} needs {' and '.join(missing)} too.")
    try:
        return known[name](**arguments)
    except (TypeError, ValueError) as error:
        raise SfumatoError(f"{name} cannot be made: {error}.") from error
