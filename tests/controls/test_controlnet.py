"""What of a ControlNet is computed how often. That it is right: tests/test_generate_controlnet.py."""

from __future__ import annotations

import jax
import pytest

import sfumato
from sfumato.models.controlnet import ControlEmbedding
from sfumato.types import Window

from pipelines import nets
from runs import picture


@pytest.mark.parametrize("watched", [False, True])
def test_the_control_picture_is_embedded_once(models, monkeypatch, watched):
    """In a run, and for all rows of guidance."""
    ((_, net),) = nets("sd1", small=True)
    own, seen = ControlEmbedding.__call__, []

    def counted(self, image):
        jax.debug.callback(lambda: seen.append(image.shape))
        return own(self, image)

    monkeypatch.setattr(ControlEmbedding, "__call__", counted)
    controls = [sfumato.CFG(5.0), sfumato.ControlNet(net, picture(3), window=Window(0.3, 1.0))]
    watch = (lambda step, steps, latents: True) if watched else None
    sfumato.generate(models("sd1"), ["", "a"], controls=controls, steps=3, seed=1, size=(16, 16), progress=watch)
    jax.effects_barrier()
    assert seen == [(2, 16, 16, 3)]
