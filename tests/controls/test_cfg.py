"""Classifier-free guidance in a part of the process."""

from __future__ import annotations

import dataclasses as dc

import numpy as np

from sfumato import CFG, Window

from oracle import assert_close


def test_no_guidance_outside_of_its_window(pair):
    plain = pair("sd1").ours(controls=[])
    assert_close(pair("sd1").ours(controls=[CFG(5.0, window=Window(1, 1))]), plain, 1e-6)
    assert np.abs(pair("sd1").ours(controls=[CFG(5.0, window=Window(0, 1))]) - plain).max() > 0.05


def test_a_window_is_a_run_in_two_parts(pair):
    """Guided up to the middle, and not from there on."""
    got = pair("sd1").ours(controls=[CFG(5.0, rescale=0.3, window=Window(0, 0.5))])
    middle = pair("sd1").ours(controls=[CFG(5.0, rescale=0.3)], stop=0.5)
    assert_close(got, pair("sd1").ours(controls=[], latents=middle, start=0.5), 1e-6)


def test_a_model_says_where_it_wants_guidance(models):
    model = models("sd1")

    def of(scale: float | None = None, **options: object) -> CFG:
        return CFG.of(dc.replace(model, options=options), scale)

    assert of() == CFG(7.5, 0.0, Window(0, 1))
    assert of(guidance_scale=3, guidance_stop=0.5) == CFG(3, 0.0, Window(0, 0.5))
    assert of(2.0, guidance_scale=3, guidance_stop=0.5) == CFG(2.0, 0.0, Window(0, 0.5))
    assert [of(guidance_stop=said).window.stop for said in (-1, 7, "late", float("nan"))] == [0, 1, 1, 1]


def test_guidance_as_the_model_wants_it_is_the_default(pair):
    both = pair("sd1")
    told = dc.replace(both, model=dc.replace(both.model, options={"guidance_scale": 5, "guidance_stop": 0.5}))
    got = told.ours(controls=None)
    assert_close(got, told.ours(controls=[CFG(5.0, window=Window(0, 0.5))]), 0)
    assert np.abs(got - both.ours(controls=[CFG(5.0)])).max() > 0.01
