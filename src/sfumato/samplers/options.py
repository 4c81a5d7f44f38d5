"""What samplers read out of settings and of a `scheduler_config.json`, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sfumato.errors import SfumatoError
from sfumato.schedule import Schedule


def kind_of(options: Mapping[str, Any]) -> str:
    """Which of `sigmas.KINDS` the noise levels shall come from."""
    return next((kind for kind in ("karras", "exponential", "beta") if options.get(f"use_{kind}_sigmas")), "native")


def only(options: Mapping[str, Any], **values: Any) -> None:
    """Raises SfumatoError if an option is something else than its value here, which is all that we have."""
    for key, value in values.items():
        if options.get(key, value) not in (value, None):
            known = "" if value is None else f"; {value} is"
            raise SfumatoError(f"The scheduler option {key} = {options[key]} is not supported{known}.")


def limit(schedule: Schedule) -> float:
    """What the schedule clips estimates of x0 to; where it does not, the largest float32."""
    return schedule.options.get("clip_sample_range", 1.0) if schedule.clip_sample else float(np.finfo(np.float32).max)


def share(what: str, value: float) -> float:
    """`value`; raises SfumatoError unless it lies in [0, 1]."""
    if not 0 <= value <= 1:
        raise SfumatoError(f"{what} must lie between 0 and 1, not be {value}.")
    return value
