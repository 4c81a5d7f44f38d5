"""What a finished picture says about itself, in our terms and in those of other tools."""

from __future__ import annotations

import numpy as np
import pytest

import sfumato
from sfumato.adapters.delta import Full
from sfumato.io.picture_metadata import to_parameters
from sfumato.record import sampler_name
from sfumato.samplers import SAMPLERS, Euler


@pytest.fixture(scope="module")
def made(loaded):
    return sfumato.generate(
        loaded("sd1"), "a (red:1.2) fox", negative="blurry", count=2, seed=7, steps=2, size=(16, 16),
        sampler="euler karras", controls=[sfumato.CFG(5.0, rescale=0.5)], clip_skip=1,
    )  # fmt: skip


def test_every_picture_has_its_own_seed_and_the_settings_of_all(made):
    assert [picture.metadata["settings"]["seed"] for picture in made] == [7, 8]
    facts = made[0].metadata
    assert facts["prompt"] == "a (red:1.2) fox"
    assert facts["settings"]["sampler"] == "euler karras"
    assert facts["family"] == "sd1"
    assert facts["controls"] == [{"name": "CFG", "scale": 5.0, "rescale": 0.5, "window": {"start": 0.0, "stop": 1.0}}]
    assert facts["versions"]["sfumato"] == sfumato.__version__


def test_adapters_are_told(loaded):
    lora = sfumato.Lora({"unet": {"conv_out": Full(np.zeros((4, 32, 3, 3), np.float32))}})
    word = sfumato.Embedding("<stripes>", {"text_encoder": np.ones(24, np.float32)})
    model = word.apply(lora.apply(loaded("sd1"), 0.5))
    (picture,) = sfumato.generate(model, "<stripes>", steps=1, size=(16, 16))
    assert picture.metadata["adapters"] == ["LoRA (0.5)", "word <stripes> (1)"]


def test_other_tools_read_it(made):
    lines = to_parameters(made[0].metadata).splitlines()
    assert lines[:2] == ["a (red:1.2) fox", "Negative prompt: blurry"]
    for pair in ("Steps: 2", "Sampler: euler karras", "CFG scale: 5", "Seed: 7", "Size: 16x16", "Clip skip: 2"):
        assert pair in lines[2].split(", ")


def test_samplers_are_called_by_the_names_that_make_them():
    assert all(SAMPLERS[sampler_name(make())]() == make() for make in SAMPLERS.values())
    assert sampler_name(Euler("beta")) == "euler beta"
