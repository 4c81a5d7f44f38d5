"""Pictures are compared by colours and by how strong edges are; torch computes it in recipes/test_controlnet.py."""

from __future__ import annotations

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfumato.errors import SfumatoError
from sfumato.train.consistency import Consistency, strengths


def plain(latents: jax.Array) -> jax.Array:
    """Of an autoencoder whose latents are the pictures."""
    return latents


def square(inside: float, outside: float) -> jax.Array:
    return jnp.full((1, 16, 16, 3), outside).at[:, 4:12, 4:12].set(inside)


def blurred(picture: jax.Array, sigma: float) -> jax.Array:
    return jnp.asarray(cv2.GaussianBlur(np.asarray(picture[0]), (0, 0), sigma)[None])


def test_the_same_pictures_differ_by_nothing():
    one = square(0.5, -0.5)
    loss, terms = Consistency(1.0, 1.0)(plain, one, one)
    assert float(loss) == 0
    assert {name: float(value) for name, value in terms.items()} == {"edges": 0, "colours": 0}


def test_edges_are_as_strong_as_neighbours_differ_at_each_size():
    sizes = strengths(square(0.5, -0.5))
    assert [each.shape for each in sizes] == [(1, 15, 15), (1, 7, 7), (1, 3, 3)]
    for each in sizes:
        assert float(each.max()) == pytest.approx(np.sqrt(2 * 3), rel=1e-3)  # a corner: down and right, three channels
        assert float(each.min()) == pytest.approx(0.01)


def test_an_edge_is_an_edge_whichever_side_is_lighter():
    edges, colours = Consistency(edges=1.0), Consistency(colours=1.0)
    one, other = square(0.5, -0.5), square(-0.5, 0.5)
    assert float(edges(plain, one, other)[0]) == pytest.approx(0, abs=1e-6)
    assert float(colours(plain, one, other)[0]) > 0.3


def test_the_more_an_edge_is_blurred_the_more_it_costs():
    real = square(0.5, -0.5)
    found = [float(Consistency(edges=1.0)(plain, blurred(real, sigma), real)[0]) for sigma in (0.5, 1.0, 2.0, 4.0)]
    assert found == sorted(found)
    assert found[0] > 0


def test_an_edge_that_is_missing_costs_three_times_as_much_as_one_too_many():
    flat, real = square(0.5, 0.5), square(0.5, -0.5)
    missing, further = (float(Consistency(edges=1.0)(plain, *each)[0]) for each in ((flat, real), (real, flat)))
    assert missing == pytest.approx(3 * further)


def test_a_blurred_picture_becomes_sharp_where_the_edges_were():
    real = square(0.5, -0.5)
    start = blurred(real, 2.0)
    consistency, optimizer = Consistency(edges=1.0), optax.adam(0.02)

    @jax.jit
    def update(picture, state):
        gradient = jax.grad(lambda one: consistency(plain, one, real)[0])(picture)
        changes, state = optimizer.update(gradient, state)
        return picture + changes, state

    picture, state = start, optimizer.init(start)
    for _ in range(300):
        picture, state = update(picture, state)
    before, after = (float(jnp.abs(strengths(one)[0] - strengths(real)[0]).mean()) for one in (start, picture))
    assert np.isfinite(np.asarray(picture)).all()
    assert after < before / 3


@pytest.mark.parametrize("wrong", [{"edges": -1.0}, {"colours": float("nan")}, {"every": 0}])
def test_what_cannot_be_is_refused(wrong):
    with pytest.raises(SfumatoError, match="Weights of consistency are 0 or more"):
        Consistency(**wrong)
