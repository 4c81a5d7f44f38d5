"""What the hooks of all controls are built on."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.controls.base import batched, gate
from sfumato.samplers.base import make_table
from sfumato.types import Conditioning, Residuals, Window

NAMES = ["cond", "uncond", "image"]


def draw(seed: int, *shape: int) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_batched_is_one_call_for_all_branches(count):
    names, calls = NAMES[:count], []
    xs = {name: draw(i, 2, 3, 3, 4) for i, name in enumerate(names)}
    conds = {name: Conditioning(draw(10 + i, 2, 5, 6)) for i, name in enumerate(names)}

    def call(x, cond):
        calls.append(x.shape)
        return {"sum": x.sum((1, 2, 3)) + cond.context.sum((1, 2)), "x": x}

    got = batched(call, xs, conds)
    assert calls == [(2 * count, 3, 3, 4)]
    assert list(got) == names
    for name in names:
        want = call(xs[name], conds[name])
        np.testing.assert_array_equal(got[name]["x"], xs[name])
        np.testing.assert_allclose(got[name]["sum"], want["sum"], rtol=1e-5, atol=1e-5)


def test_batched_keeps_the_rows_of_a_picture_together():
    """So that each device has all of its pictures' rows, in order."""
    seen = []
    batched(lambda x: seen.append(x) or x, {"a": jnp.array([[0], [1]]), "b": jnp.array([[10], [11]])})
    np.testing.assert_array_equal(seen[0][:, 0], [0, 10, 1, 11])


def residuals(value: float) -> Residuals:
    return Residuals((jnp.full((1, 2, 2, 3), value), jnp.full((1, 1, 1, 3), 2 * value)), jnp.full((1, 1, 1, 5), value))


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_gate(on, wrap):
    got = wrap(lambda on: gate(on, lambda: residuals(3.0)))(jnp.array(on))
    want = residuals(3.0 * on)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("on", [True, False])
def test_gate_runs_what_it_must_and_nothing_else(on):
    ran = []

    def costly(x):
        jax.debug.callback(lambda: ran.append(1))
        return x + 1

    jax.jit(lambda on, x: gate(on, lambda: costly(x)))(jnp.array(on), jnp.zeros(3)).block_until_ready()
    jax.effects_barrier()
    assert len(ran) == on


@pytest.mark.parametrize("on", [True, False])
def test_gate_has_gradients(on):
    slope = jax.grad(lambda x: gate(jnp.array(on), lambda: x**2).sum())(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(slope, [2.0 * on, 4.0 * on])


@pytest.mark.parametrize(
    ("window", "inside"),
    [(Window(), [1, 1, 1, 1]), (Window(0.25, 0.75), [0, 1, 1, 0]), (Window(0.0, 0.25), [1, 0, 0, 0]),
     (Window(1.0, 1.0), [0, 0, 0, 0]), (Window(0.5, 0.5), [0, 0, 0, 0]), (Window(0.3, 1.0), [0, 0, 1, 1])],
)  # fmt: skip
def test_windows_begin_with_their_start_and_end_before_their_stop(window, inside):
    steps = jax.tree.map(jnp.asarray, make_table(*np.zeros((5, 4))).steps)
    rows = [jax.tree.map(lambda column, i=i: column[i], steps) for i in range(4)]
    assert [bool(window.active(step)) for step in rows] == [bool(i) for i in inside]
