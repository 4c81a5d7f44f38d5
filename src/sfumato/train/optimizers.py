"""optax's optimizers and schedules by name, for command lines and configuration files."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from sfumato.controls.check import finite
from sfumato.errors import SfumatoError

LEARNING_RATE = "learning_rate"


def optimizer(
    name: str = "adamw", rate: float = 1e-4, *, steps: int, schedule: str = "constant", warmup: int = 0,
    options: Mapping[str, Any] | None = None, schedule_options: Mapping[str, Any] | None = None,
    rates_by: Mapping[str, float] | None = None,
) -> optax.GradientTransformationExtraArgs:  # fmt: skip
    """The optimizer of optax (or optax.contrib) of this name, with its own `options` such as b1 or weight_decay.

    The learning rate follows `schedule` (see `schedule_of`). `rates_by` are factors of it for some components, which
    are the first keys of what is trained ({"text_encoder": 0.5}); each component then has an optimizer of its own.
    Raises SfumatoError for names and options that optax does not have, factors below 0 and, when it is begun with,
    for components that are not trained.
    """
    factors = _factors(rates_by)
    rates = schedule_of(schedule, rate, steps, warmup, schedule_options)

    def made(factor: float = 1.0) -> optax.GradientTransformationExtraArgs:
        made = _called(name, optimizers(), {LEARNING_RATE: scaled(rates, factor)}, options)
        return optax.with_extra_args_support(made)

    return (
        by_component(made(), {component: made(factor) for component, factor in factors.items()}) if factors else made()
    )


def rates_of(
    rate: float = 1e-4, *, steps: int, schedule: str = "constant", warmup: int = 0,
    schedule_options: Mapping[str, Any] | None = None, rates_by: Mapping[str, float] | None = None,
) -> dict[str, optax.Schedule]:  # fmt: skip
    """The learning rates of `optimizer` with the same arguments, for `fit(rates=...)`: "learning_rate", and those of
    components with a factor as "learning_rate_text_encoder". Raises SfumatoError as it does."""
    rates = schedule_of(schedule, rate, steps, warmup, schedule_options)
    own = {f"{LEARNING_RATE}_{name}": scaled(rates, factor) for name, factor in _factors(rates_by).items()}
    return {LEARNING_RATE: rates, **own}


def scaled(schedule: optax.Schedule, factor: float) -> optax.Schedule:
    """The schedule times a number."""
    return schedule if factor == 1 else lambda step: factor * schedule(step)


def by_component(
    others: optax.GradientTransformationExtraArgs, special: Mapping[str, optax.GradientTransformationExtraArgs]
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for each component of what is trained, a dict: that of `special`, or one like `others`."""

    def init(params: Any) -> dict[str, Any]:
        known = list(params) if isinstance(params, dict) else []
        strange = [name for name in special if name not in known]
        if strange:
            raise SfumatoError(
                f"{strange[0]} cannot have a learning rate of its own: what is trained is "
                f"{', '.join(known) or 'one whole'}."
            )
        return {name: special.get(name, others).init(value) for name, value in params.items()}

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        changes, states = {}, {}
        for name, own in updates.items():
            weights = None if params is None else params[name]
            changes[name], states[name] = special.get(name, others).update(own, state[name], weights, **extra)
        return changes, states

    return optax.GradientTransformationExtraArgs(init, update)


def _factors(rates_by: Mapping[str, float] | None) -> dict[str, float]:
    return {name: finite(f"The learning rate's factor of {name}", value, 0) for name, value in (rates_by or {}).items()}


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
