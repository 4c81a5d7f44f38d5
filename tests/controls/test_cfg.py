"""Classifier-free guidance in a part of the process."""

from __future__ import annotations

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
