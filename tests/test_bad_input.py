"""Whatever does not fit is one clear sentence, before anything is compiled."""

from __future__ import annotations

import contextlib
import functools

import jax
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.models.config import ControlNetConfig, from_dict
from sfumato.models.controlnet import ControlNet as Net
from sfumato.types import Window

from oracle import fresh
from pictures import drawing
from pipelines import net_config

COMPILED = "/jax/core/compile/backend_compile_duration"
NAN, SIZE = float("nan"), (16, 16)


def picture(width: int = 16, height: int = 16) -> Image.Image:
    return drawing(width, height)


def mask(width: int = 16, height: int = 16) -> Image.Image:
    return Image.new("L", (width, height), 255)


@functools.cache
def net(kind: str) -> Net:
    return fresh(Net, from_dict(ControlNetConfig, net_config(kind)))


def control(**changes):
    return sfumato.ControlNet(**{"net": net("sd1"), "image": picture()} | changes)


def inpaint(**changes):
    return sfumato.Inpaint(**{"image": picture(), "mask": mask()} | changes)


@contextlib.contextmanager
def compilations():
    """What is compiled inside, by name."""
    names = []

    def note(event, duration, **details):
        if event == COMPILED:
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


# What is changed in a good call (controls are made in the test), and what the sentence says.
TABLE = {
    "no model": ({"model": "sd1"}, "generate takes a model as sfumato.load returns it, not a str."),
    "no prompt": ({"prompt": []}, "There is no prompt"),
    "a number as prompt": ({"prompt": 5}, "prompt must be a text or a list of texts, not 5."),
    "a number among the prompts": ({"prompt": ["a", 5]}, "prompt must be a text or a list of texts"),
    "bytes as prompt": ({"prompt": b"a"}, "prompt must be a text or a list of texts"),
    "a number as negative": ({"negative": 5}, "negative must be a text or a list of texts, not 5."),
    "more negatives": ({"negative": ["a", "b"]}, "There are 1 prompts and 2 negative ones; give one, or as many."),
    "a huge weight": ({"prompt": "(fox:" + 50 * "9" + ")"}, "is too large; 1 is plain, 1.5 much."),
    "odd width": ({"size": (17, 16)}, "the nearest sizes are 16x16 and 18x16."),
    "odd width and height": ({"size": (17, 31)}, "the nearest sizes are 16x30 and 18x32."),
    "no area": ({"size": (0, 16)}, "A size is (width, height) in whole pixels, such as (512, 512), not (0, 16)."),
    "one number as size": ({"size": 512}, "A size is (width, height) in whole pixels"),
    "a size of text": ({"size": "16x16"}, "A size is (width, height) in whole pixels"),
    "a size that is NaN": ({"size": (NAN, 16)}, "A size is (width, height) in whole pixels"),
    "0 pictures": ({"count": 0}, "count must be a whole number from 1 on, not 0."),
    "half a picture": ({"count": 0.5}, "count must be a whole number from 1 on, not 0.5."),
    "0 at once": ({"batch": 0}, "batch must be a whole number from 1 on, not 0."),
    "more seeds than pictures": ({"seed": [1, 2]}, "There are 2 seeds for 1 pictures; give one number, or 1."),
    "a negative seed": ({"seed": -1}, "A seed must be a whole number from 0 to 2^63 - 1, not -1."),
    "a seed of text": ({"seed": "x"}, "A seed must be a whole number"),
    "0 steps": ({"steps": 0}, "steps must be a whole number from 1 on, not 0."),
    "half steps": ({"steps": 2.5}, "steps must be a whole number from 1 on, not 2.5."),
    "more steps than trained": ({"steps": 1001}, "The model was trained with 1000 timesteps, too few for 1001 steps."),
    "an unknown sampler": ({"sampler": "eular"}, "Unknown sampler 'eular'; known are, for example, euler"),
    "a number as sampler": ({"sampler": 5}, "Unknown sampler 5; known are"),
    "strength above 1": ({"image": picture(), "strength": 1.5}, "strength must lie in [0, 1], not be 1.5."),
    "strength below 0": ({"image": picture(), "strength": -0.1}, "strength must lie in [0, 1], not be -0.1."),
    "strength NaN": ({"image": picture(), "strength": NAN}, "strength must be a finite number, not nan."),
    "strength of text": ({"image": picture(), "strength": "x"}, "strength must be a number, not 'x'."),
    "strength None": ({"image": picture(), "strength": None}, "strength must be a number, not None."),
    "too little strength": (
        {"image": picture(), "strength": 0.1}, "With strength 0.1 and 2 steps nothing is left to do"),
    "a picture that is not there": ({"image": "none.png"}, "none.png is not there."),
    "a picture that is none": ({"image": __file__}, "is not a picture in a known format."),
    "a picture of the wrong shape": ({"image": np.zeros((3, 16, 16, 3))}, "A picture is an array [H W]"),
    "a picture with NaN": ({"image": np.full((16, 16, 3), NAN)}, "A picture of floats has values in [0, 1]"),
    "more pictures": ({"image": [picture()] * 3}, "image: 3 pictures were given for 1 to be made; give one, or 1."),
    "start above 1": ({"start": 2}, "start must lie in [0, 1], not be 2."),
    "stop NaN": ({"stop": NAN}, "stop must be a finite number, not nan."),
    "stop before start": ({"start": 0.8, "stop": 0.5}, "start 0.8 must come before stop 0.5."),
    "start without latents": ({"start": 0.5}, "give its latents (output='latents') as well."),
    "start and image": ({"start": 0.5, "image": picture()}, "start and image both say where to begin"),
    "latents of another shape": (
        {"latents": np.zeros((1, 4, 8, 8))}, "latents must have the shape (1, 8, 8, 4), not (1, 4, 8, 8)."),
    "latents NaN": ({"latents": np.full((1, 8, 8, 4), NAN)}, "latents holds numbers that are not finite."),
    "latents of text": ({"latents": "x"}, "latents must be an array of numbers, not a str."),
    "noise of another shape": (
        {"noise": np.zeros((3, 1, 8, 8, 4))}, "noise must have the shape (2, 1, 8, 8, 4), not (3, 1, 8, 8, 4)."),
    "an unknown output": ({"output": "video"}, "output is 'images' or 'latents', not 'video'."),
    "no devices": ({"devices": []}, "devices is an empty list"),
    "clip_skip too large": ({"clip_skip": 99}, "clip_skip=99 does not fit the text encoder"),
    "clip_skip below 0": ({"clip_skip": -1}, "clip_skip=-1 does not fit the text encoder"),
    "one control, no list": ({"controls": lambda: sfumato.CFG(5)}, "controls takes a list of controls"),
    "a number among the controls": (
        {"controls": lambda: [5]}, "controls holds a int, which is no control; see sfumato.CFG."),
    "a network among the controls": (
        {"controls": lambda: [net("sd1")]}, "controls holds a ControlNet, which is no control"),
    "guidance NaN": ({"controls": lambda: [sfumato.CFG(NAN)]}, "The guidance scale must be a finite number, not nan."),
    "guidance infinite": (
        {"controls": lambda: [sfumato.CFG(float("inf"))]}, "The guidance scale must be a finite number"),
    "rescale above 1": ({"controls": lambda: [sfumato.CFG(5, 1.5)]}, "CFG's rescale must lie in [0, 1], not be 1.5."),
    "no network": (
        {"controls": lambda: [control(net="canny")]}, "ControlNet takes what load_controlnet returns, not a str."),
    "a ControlNet of another family": (
        {"controls": lambda: [control(net=net("sdxl"))]},
        "This ControlNet was made for Stable Diffusion XL and does not fit"),
    "an SD 1 ControlNet for SDXL": (
        {"model": "sdxl", "controls": lambda: [control()]},
        "This ControlNet was made for Stable Diffusion 1.x and does not fit"),
    "scale NaN": ({"controls": lambda: [control(scale=NAN)]}, "ControlNet's scale must be a finite number, not nan."),
    "scale of text": ({"controls": lambda: [control(scale="x")]}, "ControlNet's scale must be a number, not 'x'."),
    "a window backwards": (
        {"controls": lambda: [control(window=Window(0.6, 0.2))]}, "starts at 0.6 and stops before that, at 0.2."),
    "a window out of range": ({"controls": lambda: [control(window=Window(0, 2))]}, "must lie in [0, 1], not be 2."),
    "a control picture that is not there": (
        {"controls": lambda: [control(image="none.png")]}, "none.png is not there."),
    "a bad control after a good one": (
        {"controls": lambda: [inpaint(), control(scale=NAN)]}, "must be a finite number"),
    "a mask of another size": (
        {"controls": lambda: [inpaint(mask=mask(8, 16))]},
        "The mask must have the size of the picture, 16x16, and not 8x16."),
    "a mask that is not there": ({"controls": lambda: [inpaint(mask="none.png")]}, "none.png is not there."),
    "inpainting alone with 8 channels": (
        {"model": "instruct-pix2pix", "controls": lambda: [inpaint()]},
        "4 input channels beside the latents, which no control fills; add InstructPix2Pix"),
    "9 channels without inpainting": (
        {"model": "sd1-inpaint"}, "5 input channels beside the latents, which no control fills; add Inpaint"),
    "two that set the channels": (
        {"model": "sd1-inpaint", "controls": lambda: [inpaint(), inpaint()]}, "both set the extra input channels"),
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("changes", TABLE.values(), ids=TABLE)
def test_one_sentence_before_anything_is_compiled(changes, loaded):
    changes, message = changes
    call = {"model": "sd1", "prompt": "a fox", "size": SIZE, "steps": 2} | changes
    model, prompt = call.pop("model"), call.pop("prompt")
    model = model if message.startswith("generate takes") else loaded(model)
    if "controls" in call:
        call["controls"] = call["controls"]()
    with compilations() as compiled, pytest.raises(sfumato.SfumatoError) as raised:
        sfumato.generate(model, prompt, **call)
    sentence = str(raised.value)
    assert message in sentence
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    assert compiled == []


@pytest.mark.slow
def test_a_good_call_compiles(loaded):
    """So that the empty lists above mean something."""
    with compilations() as compiled:  # of a size that no other test has
        sfumato.generate(loaded("sd1"), "a fox", size=(20, 12), steps=2, controls=[inpaint()], output="latents")
    assert len(compiled) > 3
