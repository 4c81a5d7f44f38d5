"""Whole runs with ControlNets against the torch pipelines."""

from __future__ import annotations

import numpy as np
import pytest

import sfumato
from sfumato.types import Window

from pipelines import nets
from runs import mask, picture

pytestmark = pytest.mark.parity

NAMES = {"sd1": "StableDiffusion", "sd1-inpaint": "StableDiffusion", "sdxl": "StableDiffusionXL"}


@pytest.mark.parametrize(
    ("kind", "guess", "small"),
    [("sd1", False, False), ("sd1", True, False), ("sdxl", False, False), ("sdxl", True, True)],
)
def test_text_to_image(kind, guess, small, pair):
    ((net, own),) = nets(kind, small=small)
    both = pair(kind, small=small).through(f"{NAMES[kind]}ControlNetPipeline", controlnet=net)
    control = sfumato.ControlNet(own, picture(3), scale=0.8, guess=guess)
    got = both.ours(controls=[sfumato.CFG(5.0), control])
    both.assert_same(got, both.theirs(image=picture(3), controlnet_conditioning_scale=0.8, guess_mode=guess))
    assert np.abs(got - both.ours()).max() > 0.05, "the ControlNet did nothing"


def test_two_in_windows(pair):
    pairs = nets("sd1", 2)
    both = pair("sd1").through("StableDiffusionControlNetPipeline", controlnet=[net for net, _ in pairs])
    want = both.theirs(
        image=[picture(3), picture(4)], controlnet_conditioning_scale=[0.8, 0.5], control_guidance_start=[0.0, 0.2],
        control_guidance_end=[0.6, 1.0], steps=5,
    )  # fmt: skip
    controls = [
        sfumato.CFG(5.0),
        sfumato.ControlNet(pairs[0][1], picture(3), 0.8, Window(0.0, 0.6)),
        sfumato.ControlNet(pairs[1][1], picture(4), 0.5, Window(0.2, 1.0)),
    ]
    both.assert_same(both.ours(controls=controls, steps=5), want)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_image_to_image(kind, pair):
    """Its window is a share of the steps that are made, not of those that the strength leaves out."""
    ((net, own),) = nets(kind, small=True)
    both = pair(kind, small=True).through(f"{NAMES[kind]}ControlNetImg2ImgPipeline", controlnet=net)
    settings = {"image": picture(), "strength": 0.5}
    want = both.theirs(
        control_image=picture(3), controlnet_conditioning_scale=0.8, control_guidance_end=0.5, **settings
    )  # fmt: skip
    control = sfumato.ControlNet(own, picture(3), 0.8, Window(0.0, 0.5))
    both.assert_same(both.ours(controls=[sfumato.CFG(5.0), control], **settings), want)


@pytest.mark.parametrize(
    ("kind", "strength"), [("sd1", 1.0), ("sd1", 0.6), ("sd1-inpaint", 1.0), ("sdxl", 1.0)]
)  # fmt: skip
def test_inpainting(kind, strength, pair):
    ((net, own),) = nets(kind.removesuffix("-inpaint"), small=True)
    both = pair(kind, small=True).through(f"{NAMES[kind]}ControlNetInpaintPipeline", controlnet=net)
    from_picture = {} if strength == 1 else {"image": picture(), "strength": strength}
    want = both.theirs(**{
        "image": picture(), "mask_image": mask(), "control_image": picture(3), "strength": strength,
        "controlnet_conditioning_scale": 0.8,
    } | from_picture)  # fmt: skip
    controls = [sfumato.CFG(5.0), sfumato.Inpaint(picture(), mask()), sfumato.ControlNet(own, picture(3), 0.8)]
    both.assert_same(both.ours(controls=controls, **from_picture), want)
