"""What the UNet leaves out: its deeper part, and tokens."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.models import merging
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.merging import places
from sfumato.models.unet import UNet
from sfumato.types import Merging, Reuse

from models.test_unet import conditioning, evaluate, inputs, run
from models.tiny import UNETS
from oracle import assert_close, fresh

pytestmark = pytest.mark.slow


# ---- The deeper part, left out (arXiv:2312.00858)


def reused(name: str, layers: int, full: bool, kept=None, unet: UNet | None = None, seed: int = 0, taps=frozenset()):
    unet = fresh(UNet, from_dict(UNetConfig, UNETS[name])) if unet is None else unet
    values = inputs(unet.config, seed=seed)
    cond = dc.replace(conditioning(values), reuse=Reuse(jnp.array(full), kept, layers))
    return evaluate(unet, jnp.asarray(values["x"]), jnp.asarray(values["t"]), cond, taps)


def deep(unet: UNet, layers: int) -> UNet:
    """The network with weights that are no numbers wherever a shallow evaluation does not come."""
    level, last = unet.down_blocks[0], unet.up_blocks[-1]
    outside = [unet.time_embedding, unet.conv_in, unet.conv_norm_out, unet.conv_out]
    outside += [getattr(unet, "add_embedding", None)]
    for part in ("resnets", "attentions"):
        outside += getattr(level, part, [])[: layers - 1] + getattr(last, part, [])[-layers:]
    needed = {id(leaf) for module in outside if module is not None for leaf in jax.tree.leaves(module)}
    return jax.tree.map(lambda leaf: leaf if id(leaf) in needed else jnp.full_like(leaf, jnp.nan), unet)


@pytest.mark.parametrize(("name", "layers"), [("sd1", 1), ("sd1", 2), ("sd1", 3), ("sdxl", 2), ("uneven", 2)])
def test_the_deeper_part_may_come_from_before(name, layers):
    unet = fresh(UNet, from_dict(UNetConfig, UNETS[name]))
    taps = frozenset(path for path in unet.attention_paths() if path.endswith("attn2"))
    exact, values = run(unet, inputs(unet.config), taps), inputs(unet.config, seed=1)
    first = reused(name, layers, True, taps=taps)
    assert exact.kept is None
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-6), (first.eps, first.taps), (exact.eps, exact.taps))
    again = reused(name, layers, False, first.kept, taps=taps)
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-6), (again.eps, again.taps), (exact.eps, exact.taps))

    other = reused(name, layers, False, first.kept, seed=1, taps=taps)
    assert np.abs(other.eps - run(unet, values).eps).max() > 1e-3, "nothing was left out"
    jax.tree.map(np.testing.assert_array_equal, other.kept, first.kept)
    broken = deep(unet, layers)
    np.testing.assert_array_equal(reused(name, layers, False, first.kept, broken, 1, taps).eps, other.eps)
    assert np.isnan(reused(name, layers, True, first.kept, broken, 1, taps).eps).all()


def test_what_is_full_takes_nothing_from_before():
    first, other = reused("sd1", 2, True), reused("sd1", 2, True, seed=1)
    got = reused("sd1", 2, True, first.kept, seed=1)
    assert_close(got.eps, other.eps, 1e-6)
    jax.tree.map(lambda got, want: assert_close(got, want, 1e-6), got.kept, other.kept)


# ---- Merged tokens (arXiv:2303.17604)


@pytest.fixture
def merged(monkeypatch):
    """The sizes of the pictures whose tokens are merged, one for each layer."""
    sizes = []

    def note(x, size, count):
        sizes.append(size)
        return places(x, size, count)

    monkeypatch.setattr(merging, "places", note)
    return sizes


@pytest.mark.parametrize(("name", "changes", "layers", "size", "want"), [
    ("sd1", {}, 5, (8, 8), (8, 8)), ("sdxl", {}, 5, (8, 8), (4, 4)), ("sdxl", {}, 5, (7, 9), (4, 5)),
    ("sdxl", {"downsample_padding": 0}, 5, (7, 9), (3, 4)),
])  # fmt: skip
def test_tokens_are_merged_at_the_highest_resolution(name, changes, layers, size, want, merged):
    unet = fresh(UNet, from_dict(UNetConfig, UNETS[name] | changes))
    values = inputs(unet.config, size=size)
    at = jnp.asarray(values["x"]), jnp.asarray(values["t"]), conditioning(values)

    @jax.jit
    def call(unet: UNet, on: jax.Array):
        return unet(*at[:2], dc.replace(at[2], merging=Merging(on, 0.5))).eps

    exact = evaluate(unet, *at).eps
    assert np.abs(call(unet, jnp.array(True)) - exact).max() > 1e-3
    assert merged == [want] * layers
    np.testing.assert_array_equal(call(unet, jnp.array(False)), exact)

    merged.clear()
    path = next(path for path in unet.attention_paths() if path.endswith("attn1"))
    cond = dc.replace(at[2], merging=Merging(jnp.array(True), 0.5))
    maps = jax.eval_shape(lambda unet: unet(*at[:2], cond, [path]).taps, unet)
    assert list(maps) == [path]
    assert len(merged) == layers - 1, "a layer whose map is wanted is exact"
