"""Token merging against a plain one, token by token (arXiv:2210.12461, section 3; arXiv:2303.17604, section 4)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.models.attention import Attention
from sfumato.models.merging import Merge, merge, places, squares, unmerge

from oracle import assert_close

SIZES = [(4, 4), (5, 7), (1, 6), (2, 2)]
ON, OFF = jnp.array(True), jnp.array(False)


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def plain(x: np.ndarray, size: tuple[int, int], count: int) -> tuple[list[set[int]], dict[int, int]]:
    """The groups of tokens of one picture that become one, in order, and the group of each token."""
    height, width = size
    targets = [r * width + c for r in range(0, height, 2) for c in range(0, width, 2)]
    sources = [token for token in range(height * width) if token not in targets]

    def alike(one: int, other: int) -> float:
        return float(x[one] @ x[other] / np.linalg.norm(x[one]) / np.linalg.norm(x[other]))

    best = {one: max(targets, key=lambda other: alike(one, other)) for one in sources}
    ordered = sorted(sources, key=lambda one: -alike(one, best[one]))
    groups = {target: {target} for target in targets}
    for one in ordered[:count]:
        groups[best[one]].add(one)
    merged = [{one} for one in ordered[count:]] + list(groups.values())
    return merged, {token: i for i, group in enumerate(merged) for token in group}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.75])
def test_as_token_by_token(size, ratio):
    tokens = size[0] * size[1]
    x, count = draw(3, tokens, 8), min(int(ratio * tokens), len(squares(size)[1]))
    place = places(jnp.asarray(x), size, count)
    got = merge(jnp.asarray(x), place, tokens - count)
    back = unmerge(got, place)
    assert got.shape == (3, tokens - count, 8)
    for picture in range(3):
        groups, of = plain(x[picture], size, count)
        np.testing.assert_array_equal(place[picture], [of[token] for token in range(tokens)])
        means = np.stack([x[picture][sorted(group)].mean(0) for group in groups])
        assert_close(got[picture], means, 1e-6)
        assert_close(back[picture], np.stack([means[of[token]] for token in range(tokens)]), 1e-6)


def test_one_token_of_each_square_stays():
    targets, sources = squares((5, 6))
    np.testing.assert_array_equal(targets, [0, 2, 4, 12, 14, 16, 24, 26, 28])
    assert sorted([*targets, *sources]) == list(range(30))
    layer = Merge(ON, 0.75, (5, 6))
    seen = []
    layer(lambda y: seen.append(y.shape[1]) or y, jnp.asarray(draw(1, 30, 4)))
    assert seen == [9, 30]


def test_tokens_that_are_alike_lose_nothing():
    """Pictures of 2 x 2 squares of one colour: three quarters of the tokens go, and all comes back."""
    x = jnp.asarray(draw(2, 3, 4, 8)).repeat(2, axis=1).repeat(2, axis=2).reshape(2, 48, 8)
    assert_close(Merge(ON, 0.75, (6, 8))(lambda y: 2 * y, x), 2 * x, 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_of_attention(dtype):
    """Merged, it is attention among the means; switched off or of ratio 0, it is the layer itself, bit for bit."""
    attention = jax.tree.map(lambda a: a.astype(dtype), Attention(8, 2, rngs=nnx.Rngs(0)))
    x = jnp.asarray(draw(2, 16, 8), dtype)

    @jax.jit
    def run(merging: jax.Array, x: jax.Array) -> jax.Array:
        return attention(x, tap=Merge(merging, 0.5, (4, 4)))[0]

    place = places(x, (4, 4), 8)
    want = unmerge(attention(merge(x, place, 8))[0], place)
    assert run(ON, x).dtype == dtype
    assert_close(run(ON, x).astype(jnp.float32), want.astype(jnp.float32), 1e-6 if dtype == jnp.float32 else 2e-2)
    assert np.abs(np.asarray(run(ON, x) - run(OFF, x), np.float32)).max() > 1e-3
    np.testing.assert_array_equal(run(OFF, x), jax.jit(lambda x: attention(x)[0])(x))
    np.testing.assert_array_equal(attention(x, tap=Merge(ON, 0.0, (4, 4)))[0], attention(x)[0])
    assert attention(x, tap=Merge(ON, 0.5, (4, 4)))[1] is None


def test_gradients_are_those_of_the_means():
    """Which tokens are merged has none; with the groups held fast, the difference quotient agrees."""
    x, weights = jnp.asarray(draw(1, 16, 4)), jnp.asarray(draw(2, 16, 4)[1:])
    layer = Merge(ON, 0.5, (4, 4))

    def loss(x: jax.Array) -> jax.Array:
        return (weights * layer(lambda y: y**2, x)).sum()

    place, direction, step = places(x, (4, 4), 8), jnp.asarray(draw(1, 16, 4)) * weights, 1e-3

    def fixed(x: jax.Array) -> jax.Array:
        return (weights * unmerge(merge(x, place, 8) ** 2, place)).sum()

    slope = (fixed(x + step * direction) - fixed(x - step * direction)) / (2 * step)
    np.testing.assert_allclose((jax.grad(loss)(x) * direction).sum(), slope, rtol=1e-2)
