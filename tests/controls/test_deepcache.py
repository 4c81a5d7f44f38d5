"""DeepCache: the rows that are computed in full, and what becomes of the others."""

from __future__ import annotations

import dataclasses as dc
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, SAG, ControlNet, DeepCache, SfumatoError, Window
from sfumato.controls.sag import MIDDLE
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.unet import UNet
from sfumato.samplers import DDIM
from sfumato.schedule import to_eps, to_x0
from sfumato.types import Reuse

from drive import EXECUTIONS, counted, pictures, prepared
from models.tiny import SD1
from oracle import assert_close, fresh
from table import OPEN, ROWS, cfg, controlnet


@pytest.fixture(scope="module")
def model(loaded):
    """A model of two levels, quick to compile."""
    config = from_dict(UNetConfig, SD1 | {"block_out_channels": [16, 16], "layers_per_block": 1})
    return dc.replace(loaded("sd1"), unet=fresh(UNet, config), name="tiny")


def by_hand(model, every: int, layers: int, window: Window = OPEN) -> np.ndarray:
    """The loop written out: DDIM with guidance, and what was kept of each branch."""
    unet, steps, _, x, base = prepared(model, (CFG(5.0),))
    kept, age, memory = {}, every, DDIM().init(x)
    evaluate = jax.jit(lambda x, t, cond: unet(x, t, cond))
    for i in range(ROWS):
        step = jax.tree.map(lambda column, i=i: column[i], steps)
        age += 1
        full = age >= every or not window.active(step)
        age = 0 if full else age
        outs = {}
        for name in ("cond", "uncond"):
            reuse = Reuse(jnp.array(full), kept.get(name), layers)
            pred = evaluate(x, step.t, dc.replace(base[name], reuse=reuse))
            outs[name], kept[name] = pred.eps, pred.kept
        out = outs["uncond"] + 5 * (outs["cond"] - outs["uncond"])
        clean, eps = (to(out, x, step.alpha, step.sigma, "epsilon") for to in (to_x0, to_eps))
        x, memory = DDIM().step(x, clean, eps, step, memory)
    return np.asarray(x)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "layers", "window"), [
    (2, 1, OPEN), (2, 2, OPEN), (3, 2, OPEN), (99, 2, Window(0.5, 1)),
])  # fmt: skip
def test_as_the_loop_written_out(every, layers, window, model):
    got = pictures(model, (CFG(5.0), DeepCache(every, layers, window)))
    assert_close(got, by_hand(model, every, layers, window), 1e-5)
    assert np.abs(got - pictures(model, cfg("sd1"))).max() > 1e-3


@pytest.mark.slow
def test_what_is_left_out_does_not_run(model):
    """The middle blocks of the UNet and of a ControlNet beside it are counted."""
    (control,) = controlnet("sd1")
    net = fresh(type(control.net), dc.replace(control.net.config, **shared(model.unet.config)))
    watched, unet = [jax.tree.map(lambda a: a, each) for each in (net, model.unet)], model.unet
    for each in watched:
        each.mid_block = counted(each.mid_block)
    net, unet = watched

    def executions(every: int, window: Window = OPEN) -> int:
        EXECUTIONS[0] = 0
        controls = (CFG(5.0), ControlNet(net, control.image, 0.8), DeepCache(every, window=window))
        pictures(dc.replace(model, unet=unet), controls)
        jax.effects_barrier()
        return EXECUTIONS[0]

    assert [executions(every) for every in (1, 2, 3, 9)] == [2 * rows for rows in (4, 2, 2, 1)]
    assert executions(9, Window(0.25, 0.75)) == 2 * 2  # the first and the last
    assert executions(2, Window(0.5, 1.0)) == 2 * 3  # after two full ones every second


def shared(config) -> dict:
    return {field: getattr(config, field) for field in ("block_out_channels", "layers_per_block", "down_block_types")}


@pytest.mark.slow
def test_with_every_row_in_full_it_is_absent_beside_others(model):
    """Self-attention guidance looks at a map of the part that may be left out."""
    want = pictures(model, (CFG(5.0), SAG(0.75)))
    assert MIDDLE in SAG.taps
    for controls in ((CFG(5.0), SAG(0.75), DeepCache(1)), (DeepCache(1), SAG(0.75), CFG(5.0))):
        assert_close(pictures(model, controls), want, 1e-6)
    some = [pictures(model, (CFG(5.0), SAG(scale), DeepCache(2))) for scale in (0.0, 0.75)]
    assert np.isfinite(some).all()
    assert np.abs(some[1] - some[0]).max() > 1e-3


@pytest.mark.slow
def test_nothing_is_compiled_when_rows_change(model, compiled):
    watched = functools.partial(pictures, model, progress=lambda *_: True)
    first = watched((CFG(5.0), DeepCache(2)))
    compiled.clear()
    assert np.any(watched((CFG(5.0), DeepCache(3, window=Window(0.2, 0.9)))) != first)
    assert compiled == []


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [
    ([{"every": 0}], "DeepCache's every must be a whole number from 1 on, not 0."),
    ([{"every": 2.5}], "DeepCache's every must be a whole number from 1 on, not 2.5."),
    ([{"layers": 0}], "DeepCache's layers must be a whole number from 1 on, not 0."),
    ([{"layers": 3}], "DeepCache's layers must be at most 2, for tiny has no more, not 3."),
    ([{"window": Window(0, 2)}], "The stop of DeepCache must lie in [0, 1], not be 2."),
    ([{}, {}],
     "DeepCache and DeepCache cannot run together: one says how often everything is computed."),
])  # fmt: skip
def test_bad_input(changes, message, model):
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(model, "a fox", size=(16, 16), controls=[DeepCache(**each) for each in changes])
    assert str(raised.value) == message
