"""Samplers: ways from noise to a picture, one paper a file, and the names that people know them by."""

from __future__ import annotations

import dataclasses as dc
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.samplers.base import Sampler, Table
from sfumato.samplers.ddim import DDIM
from sfumato.samplers.ddim_inverse import DDIMInverse
from sfumato.samplers.ddpm import DDPM
from sfumato.samplers.deis import DEIS
from sfumato.samplers.dpm2 import DPM2
from sfumato.samplers.dpm2_ancestral import DPM2Ancestral
from sfumato.samplers.dpm_singlestep import DPMSinglestep
from sfumato.samplers.dpmpp_2m import DPMpp2M
from sfumato.samplers.dpmpp_2m_sde import DPMpp2MSDE
from sfumato.samplers.dpmpp_2s_ancestral import DPMpp2SAncestral
from sfumato.samplers.dpmpp_sde import DPMppSDE
from sfumato.samplers.euler import Euler
from sfumato.samplers.euler_ancestral import EulerAncestral
from sfumato.samplers.heun import Heun
from sfumato.samplers.lcm import LCM
from sfumato.samplers.lms import LMS
from sfumato.samplers.pndm import PNDM
from sfumato.samplers.regularised_inverse import RegularisedInverse
from sfumato.samplers.sigmas import KINDS
from sfumato.samplers.tcd import TCD
from sfumato.samplers.unipc import UniPC
from sfumato.schedule import Schedule

__all__ = [
    "DDIM", "DDPM", "DEIS", "DPM2", "LCM", "LMS", "PNDM", "SAMPLERS", "TCD", "DDIMInverse", "DPM2Ancestral",
    "DPMSinglestep", "DPMpp2M", "DPMpp2MSDE", "DPMpp2SAncestral", "DPMppSDE", "Euler", "EulerAncestral", "Heun",
    "RegularisedInverse", "Sampler", "Table", "UniPC", "sampler",
]  # fmt: skip

NAMES: Mapping[str, type[Sampler]] = {
    "ddim": DDIM, "ddpm": DDPM, "pndm": PNDM, "plms": PNDM, "lms": LMS, "euler": Euler, "euler a": EulerAncestral,
    "heun": Heun, "dpm2": DPM2, "dpm2 a": DPM2Ancestral, "dpm++ 2s": DPMSinglestep, "dpm++ 2s a": DPMpp2SAncestral,
    "dpm++ 2m": DPMpp2M, "dpm++ sde": DPMppSDE, "dpm++ 2m sde": DPMpp2MSDE, "deis": DEIS, "unipc": UniPC, "lcm": LCM,
    "tcd": TCD,
}  # fmt: skip

SAMPLERS: Mapping[str, Callable[..., Sampler]] = NAMES | {
    f"{name} {kind}": functools.partial(make, sigmas=kind)
    for name, make in NAMES.items()
    for kind in KINDS[1:]
    if any(field.name == "sigmas" for field in dc.fields(make))
}
"""Samplers by name: those of `NAMES`, and with " karras", " exponential" or " beta" behind it where a sampler takes its
noise levels from such a curve."""

SPELLINGS = (("_", " "), ("dpmpp", "dpm++"), ("dpm 2", "dpm2"), (" ancestral", " a"), ("uni pc", "unipc"))
"""Other ways to write these names."""

SCHEDULERS: Mapping[str, Callable[[Mapping[str, Any]], Sampler]] = {
    "DDIM": DDIM.from_options, "DDIMParallel": DDIM.from_options, "DDPM": DDPM.from_options,
    "DDPMParallel": DDPM.from_options, "PNDM": PNDM.from_options, "LMSDiscrete": LMS.from_options,
    "EulerDiscrete": Euler.from_options, "EulerAncestralDiscrete": EulerAncestral.from_options,
    "HeunDiscrete": Heun.from_options, "KDPM2Discrete": DPM2.from_options,
    "KDPM2AncestralDiscrete": DPM2Ancestral.from_options, "DPMSolverSinglestep": DPMSinglestep.from_options,
    "DPMSolverMultistep": lambda options: multistep(options).from_options(options),
    "DPMSolverSDE": DPMppSDE.from_options, "DEISMultistep": DEIS.from_options, "UniPCMultistep": UniPC.from_options,
    "LCM": LCM.from_options, "TCD": TCD.from_options,
}  # fmt: skip
"""diffusers' names, without "Scheduler", and what makes a sampler of the options of a `scheduler_config.json`."""


def multistep(options: Mapping[str, Any]) -> type[DPMpp2M] | type[DPMpp2MSDE]:
    """Which of the two samplers DPMSolverMultistep means."""
    return DPMpp2MSDE if options.get("algorithm_type", "").startswith("sde") else DPMpp2M


def sampler(which: str | Sampler | None, schedule: Schedule) -> Sampler:
    """The sampler of this name in `SAMPLERS`, the sampler itself, or for None the one that the schedule asks for.

    Raises SfumatoError for a name that is not known, and for a configuration that asks for what is not supported.
    """
    if isinstance(which, Sampler):
        return which
    if which is None:
        name = schedule.class_name.removesuffix("Scheduler")
        if name not in SCHEDULERS:
            raise SfumatoError(
                f"The model asks for the sampler {schedule.class_name}, which is not supported; name one of"
                f" {', '.join(NAMES)}."
            )
        return SCHEDULERS[name]({"clip_sample": schedule.clip_sample, **schedule.options})
    name = " ".join(functools.reduce(lambda name, pair: name.replace(*pair), SPELLINGS, str(which).lower()).split())
    if name not in SAMPLERS:
        near = difflib.get_close_matches(name, SAMPLERS, n=3) or NAMES
        raise SfumatoError(f"Unknown sampler {which!r}; known are, for example, {', '.join(near)}.")
    return SAMPLERS[name]()
