"""Which sampler a name or a checkpoint's configuration means."""

from __future__ import annotations

import re

import pytest

from sfumato.errors import SfumatoError
from sfumato.samplers import (
    DDIM,
    DDPM,
    DEIS,
    DPM2,
    LCM,
    LMS,
    NAMES,
    PNDM,
    SAMPLERS,
    SCHEDULERS,
    TCD,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2MSDE,
    DPMppSDE,
    DPMSinglestep,
    Euler,
    EulerAncestral,
    Heun,
    UniPC,
    sampler,
)  # fmt: skip
from sfumato.schedule import Schedule


@pytest.mark.parametrize(("name", "expected"), [
    ("ddim", DDIM()), ("PLMS", PNDM()), ("Euler a", EulerAncestral()), ("euler_ancestral", EulerAncestral()),
    ("DPM++ 2M Karras", DPMpp2M(sigmas="karras")), ("dpmpp_2m_sde", DPMpp2MSDE()), ("dpm_2_ancestral", DPM2Ancestral()),
    ("uni_pc", UniPC()), ("  euler  beta ", Euler("beta")), ("lms exponential", LMS("exponential")),
])  # fmt: skip
def test_names(name, expected):
    assert sampler(name, Schedule()) == expected


def test_all_names():
    assert {type(sampler(name, Schedule())) for name in SAMPLERS} == set(NAMES.values())
    assert "ddim karras" not in SAMPLERS
    own = DDIM(eta=0.5)
    assert sampler(own, Schedule()) is own


@pytest.mark.parametrize(("config", "expected"), [
    ({}, DDIM()),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_small_log"}, DDPM()),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, DDPM("fixed_large")),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, PNDM()),
    ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True}, LMS("karras")),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False}, Euler()),
    ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True, "sigma_min": None}, Euler("beta")),
    ({"_class_name": "EulerAncestralDiscreteScheduler", "use_karras_sigmas": True}, EulerAncestral()),
    ({"_class_name": "HeunDiscreteScheduler", "clip_sample": False}, Heun()),
    ({"_class_name": "KDPM2DiscreteScheduler", "use_exponential_sigmas": True}, DPM2("exponential")),
    ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, DPM2Ancestral()),
    ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, DPMpp2M(order=3)),
    ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}, DPMpp2MSDE()),
    ({"_class_name": "DPMSolverSinglestepScheduler", "use_karras_sigmas": True}, DPMSinglestep(sigmas="karras")),
    ({"_class_name": "DPMSolverSDEScheduler"}, DPMppSDE()),
    ({"_class_name": "DEISMultistepScheduler"}, DEIS()),
    ({"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1"}, UniPC(solver="bh1")),
    ({"_class_name": "LCMScheduler"}, LCM()),
    ({"_class_name": "TCDScheduler"}, TCD()),
], ids=str)  # fmt: skip
def test_configurations(config, expected):
    assert sampler(None, Schedule.from_config(config)) == expected


@pytest.mark.parity
@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"DPMSolverSDE"}))  # which needs torchsde to be made
def test_defaults_of_the_reference(name):
    """A configuration that diffusers writes is understood, and the options that foreign schedulers leave in it pass."""
    diffusers = pytest.importorskip("diffusers")
    given = {"skip_prk_steps": True} if name == "PNDM" else {}
    config = dict(getattr(diffusers, name + "Scheduler")(**given).config)
    config |= {"_class_name": name + "Scheduler", "skip_prk_steps": True, "sample_max_value": 1.0}
    found = sampler(None, Schedule.from_config(config))
    assert found == sampler(None, Schedule.from_config({"_class_name": name + "Scheduler"}))


@pytest.mark.parametrize(("config", "message"), [
    ({"_class_name": "VQDiffusionScheduler"}, "sampler VQDiffusionScheduler, which is not supported; name one of"),
    ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding = True is not supported; False is"),
    ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance 'learned'"),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, "skip_prk_steps = False is not supported; True is"),
    ({"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"}, "interpolation_type = log_linear"),
    ({"_class_name": "EulerDiscreteScheduler", "sigma_max": 700.0}, "sigma_max = 700.0 is not supported."),
    ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, "clip_sample = True is not supported; False is."),
    ({"_class_name": "LCMScheduler", "thresholding": True}, "thresholding = True"),
], ids=str)  # fmt: skip
def test_what_is_not_supported(config, message):
    with pytest.raises(SfumatoError, match=re.escape(message)):
        sampler(None, Schedule.from_config(config))


@pytest.mark.parametrize(
    ("name", "near"), [("eular", "euler"), ("dpm++ 2 karras", "dpm++ 2s karras"), ("?", "ddim, ddpm")]
)
def test_unknown_names(name, near):
    with pytest.raises(SfumatoError, match=f"Unknown sampler {re.escape(repr(name))}; .*{re.escape(near)}"):
        sampler(name, Schedule())


@pytest.mark.parametrize("make", [Euler, LMS, Heun, DPM2, DPM2Ancestral, EulerAncestral])
def test_unknown_noise_levels(make):
    with pytest.raises(SfumatoError, match="noise spacing 'karas'; known are native, karras, exponential, beta"):
        make("karas")


@pytest.mark.parametrize("make", [DDIM, TCD, EulerAncestral, DPM2Ancestral])
def test_wrong_eta(make):
    with pytest.raises(SfumatoError, match=r"eta must lie between 0 and 1, not be 1\.5"):
        make(eta=1.5).table(Schedule(), 10)
