"""What the loop makes before its first row. That its rows are right: the laws, and the parity of whole runs."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato import CFG
from sfumato.controls import Control
from sfumato.errors import SfumatoError
from sfumato.models.attention import Attention
from sfumato.types import pytree

from drive import pictures
from oracle import assert_close
from pipelines import nets
from runs import picture
from table import PROMPTS

WATCHES = {"whole": None, "watched": lambda *_: True}


@pytest.fixture
def heard(monkeypatch):
    """The widths of the texts that keys and values were made of, as often as they were."""
    own, seen = Attention.hear, []

    def counted(self, context):
        if self.to_k.kernel.shape[0] != self.to_q.kernel.shape[0]:  # it attends to a text
            jax.debug.callback(lambda: seen.append(context.shape))
        return own(self, context)

    jax.clear_caches()  # programs without the count
    monkeypatch.setattr(Attention, "hear", counted)
    yield seen
    jax.clear_caches()


@pytest.mark.parametrize("watch", WATCHES)
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_keys_and_values_are_made_once_a_run(kind, watch, models, heard):
    """In the UNet and in ControlNets, also where the negative prompt's rows go without one."""
    model, ((_, net),) = models(kind), nets(kind, small=True)
    layers = len([path for path in model.unet.attention_paths() if path.endswith(".attn2")])
    more = len([layer for path, layer in nnx.iter_modules(net) if path and path[-1] == "attn2"])
    assert min(layers, more) > 0
    given = [CFG(5.0), sfumato.ControlNet(net, picture(3)), sfumato.ControlNet(net, picture(4), guess=True)]
    pictures(model, tuple(given), [0, 1], progress=WATCHES[watch])
    jax.effects_barrier()
    assert {shape[:2] for shape in heard} == {(2, 77)}
    assert len(heard) == 2 * layers + 3 * more, "for each layer and branch"


@pytree
class Other(Control):
    """Other words, whatever the run began with."""

    words: Any

    def condition(self, conds, xs, step):
        return {name: dc.replace(cond, context=self.words) for name, cond in conds.items()}


def test_a_control_may_have_other_words(models):
    """What was made of the first ones is not used."""
    model = models("sd1")
    words = sfumato.text.prompt.encode_prompt(model, sfumato.text.prompt.tokenize_prompt(model, [PROMPTS[1]])).hidden
    ((_, net),) = nets("sd1", small=True)
    for controls in ((), (sfumato.ControlNet(net, picture(3)),)):
        got = pictures(model, (Other(words), *controls), [0], seed=3)
        assert_close(got, pictures(model, controls, [0], seed=3, prompt=[PROMPTS[1]]), 1e-6)
        assert np.abs(got - pictures(model, controls, [0], seed=3)).max() > 1e-3


@pytree
class Stranger(Control):
    """Has a field when it is ready that it does not have."""

    def ready(self, conds):
        return {"more": np.float32(1)}


@pytest.mark.parametrize("watch", WATCHES)
def test_a_control_has_no_other_fields_when_it_is_ready(watch, models):
    with pytest.raises(SfumatoError, match=r"Stranger\.ready gives a field 'more', which it does not have\."):
        pictures(models("sd1"), (Stranger(),), [0], progress=WATCHES[watch])
