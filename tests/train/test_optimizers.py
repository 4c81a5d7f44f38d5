from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfumato.errors import SfumatoError
from sfumato.train.optimizers import optimizer, optimizers, schedule_of, schedules


def test_all_of_optax_are_there():
    assert {"adamw", "adafactor", "lion", "sgd", "lamb", "prodigy", "muon", "schedule_free_adamw"} <= set(optimizers())
    assert {"constant_schedule", "linear_schedule", "cosine_decay_schedule", "exponential_decay"} <= set(schedules())


def test_an_optimizer_by_name_is_the_one_of_optax():
    ours, theirs = optimizer("adamw", 0.1, steps=5, options={"b1": 0.8}), optax.adamw(0.1, b1=0.8)
    weights, gradients = {"w": jnp.arange(3.0)}, {"w": jnp.ones(3)}
    got, _ = ours.update(gradients, ours.init(weights), weights)
    want, _ = theirs.update(gradients, theirs.init(weights), weights)
    np.testing.assert_allclose(got["w"], want["w"], rtol=1e-6)


@pytest.mark.parametrize("name", ["adafactor", "lion", "sgd", "prodigy", "muon", "schedule_free_adamw"])
def test_others_take_a_step(name):
    made = optimizer(name, 0.1, steps=5, schedule="cosine")
    weights = {"w": jnp.ones((4, 4))}
    state = made.init(weights)
    updates, _ = made.update(weights, state, weights)
    assert jnp.isfinite(updates["w"]).all()


@pytest.mark.parametrize(("name", "middle", "last"), [
    ("constant", 1.0, 1.0), ("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("polynomial", 0.5, 0.0),
    ("warmup_cosine", None, 0.0), ("cosine_decay_schedule", 0.5, 0.0),
])  # fmt: skip
def test_schedules_warm_up_and_end_with_the_run(name, middle, last):
    rate = schedule_of(name, 1.0, steps=110, warmup=10)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(5), 0.5)
    np.testing.assert_allclose(rate(10), 1)
    np.testing.assert_allclose(rate(110), last, atol=1e-6)
    if middle is not None:
        np.testing.assert_allclose(rate(60), middle)


def test_options_of_a_schedule():
    rate = schedule_of("exponential", 1.0, steps=100, options={"decay_rate": 0.25, "end_value": None})
    np.testing.assert_allclose(rate(50), 0.5)


@pytest.mark.parametrize(("settings", "message"), [
    ({"name": "adamv"}, "optax has no 'adamv'; it has .*adamw"),
    ({"options": {"beta": 1}}, "adamw has no option 'beta'; it has learning_rate, b1"),
    ({"schedule": "cosin"}, "optax has no 'cosin'; it has .*cosine_decay_schedule"),
    ({"schedule": "exponential"}, "exponential_decay needs decay_rate too"),
])  # fmt: skip
def test_names_and_options_that_are_not_there(settings, message):
    with pytest.raises(SfumatoError, match=message):
        optimizer(**{"steps": 5} | settings)
