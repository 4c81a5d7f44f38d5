"""Token merging as a control; what it does to a layer is in tests/models/test_merging.py."""

from __future__ import annotations

import dataclasses as dc

import numpy as np
import pytest

import sfumato
from sfumato import SfumatoError, TokenMerging, Window
from sfumato.models import merging
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.layers import abstract
from sfumato.models.merging import places
from sfumato.models.unet import UNet

from drive import pictures
from models.tiny import SD1
from table import cfg, controlnet


@pytest.mark.slow
def test_of_no_tokens_it_is_absent(models):
    want = pictures(models("sd1"), cfg("sd1"))
    np.testing.assert_array_equal(pictures(models("sd1"), (*cfg("sd1"), TokenMerging(0.0))), want)
    np.testing.assert_array_equal(pictures(models("sd1"), (*cfg("sd1"), TokenMerging(0.001))), want)


@pytest.mark.slow
def test_more_tokens_are_more_of_a_change(models):
    want = pictures(models("sd1"), cfg("sd1"))
    apart = [np.abs(pictures(models("sd1"), (*cfg("sd1"), TokenMerging(r))) - want).mean() for r in (0.1, 0.4, 0.75)]
    assert 0 < apart[0] < apart[1] < apart[2]


@pytest.mark.slow
def test_a_controlnet_beside_it_merges_nothing(models, monkeypatch):
    counts = []

    def note(x, size, count):
        counts.append(count)
        return places(x, size, count)

    monkeypatch.setattr(merging, "places", note)
    for order in (slice(None), slice(None, None, -1)):
        counts.clear()
        pictures(models("sd1"), (*cfg("sd1"), *controlnet("sd1"), TokenMerging(0.25 + 0.25 * bool(order.step)))[order])
        own = [path for path in models("sd1").unet.attention_paths() if path.endswith("attn1")]
        assert len(counts) == len(own)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("config", "changes", "message"), [
    ({}, [{"ratio": 0.8}], "TokenMerging's ratio must lie in [0, 0.75], not be 0.8."),
    ({}, [{"ratio": -0.1}], "TokenMerging's ratio must lie in [0, 0.75], not be -0.1."),
    ({}, [{"ratio": "half"}], "TokenMerging's ratio must be a number, not 'half'."),
    ({}, [{"window": Window(0.5, 0.4)}],
     "The window of TokenMerging starts at 0.5 and stops before that, at 0.4."),
    ({}, [{}, {}],
     "TokenMerging and TokenMerging cannot run together: one says how many tokens go."),
    ({"mid_block_type": None, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
     [{}], "TokenMerging is for self-attention layers, and tiny has none."),
])  # fmt: skip
def test_bad_input(config, changes, message, loaded):
    unet = abstract(UNet, from_dict(UNetConfig, SD1 | config))
    model = dc.replace(loaded("sd1"), unet=unet, name="tiny")
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(model, "a fox", size=(16, 16), controls=[TokenMerging(**each) for each in changes])
    assert str(raised.value) == message
