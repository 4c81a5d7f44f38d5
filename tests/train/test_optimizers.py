from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfumato.errors import SfumatoError
from sfumato.train.optimizers import optimizer, optimizers, rates_of, schedule_of, schedules


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


WEIGHTS = {"unet": {"w": jnp.arange(4.0)}, "text_encoder": {"w": jnp.ones(3)}, "vae": [jnp.full(2, 2.0)]}


def steps_of(made, weights, count):
    """What some steps along the weights themselves add to them, one after another."""
    state, found = made.init(weights), []
    for _ in range(count):
        change, state = made.update(weights, state, weights)
        found.append(change)
        weights = optax.apply_updates(weights, change)
    return found


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw"])
def test_each_component_is_trained_as_if_alone_at_its_own_rate(name):
    """Also by optimizers whose rate is more than a factor at the end."""
    settings = {"schedule": "cosine", "warmup": 1, "steps": 4}
    got = steps_of(optimizer(name, 0.1, rates_by={"text_encoder": 0.5, "vae": 0}, **settings), WEIGHTS, 3)
    for component, rate in (("unet", 0.1), ("text_encoder", 0.05), ("vae", 0)):
        want = steps_of(optimizer(name, rate, **settings), WEIGHTS[component], 3)
        for ours, theirs in zip(got, want, strict=True):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours[component], theirs)


def test_rates_are_told_as_they_are():
    settings = {"steps": 6, "schedule": "linear", "warmup": 2, "rates_by": {"text_encoder": 0.5, "vae": 1}}
    rates = rates_of(0.1, **settings)
    assert list(rates) == ["learning_rate", "learning_rate_text_encoder", "learning_rate_vae"]
    made = optimizer("sgd", 0.1, **settings)
    state = made.init(WEIGHTS)
    for step in range(6):
        change, state = made.update(WEIGHTS, state, WEIGHTS)
        for name, rate in (("unet", "learning_rate"), ("text_encoder", "learning_rate_text_encoder")):
            np.testing.assert_allclose(change[name]["w"], -rates[rate](step) * WEIGHTS[name]["w"], rtol=1e-6)
    assert rates_of(0.1, steps=6).keys() == {"learning_rate"}


def test_factors_that_do_not_fit():
    made = optimizer("sgd", 0.1, steps=5, rates_by={"unet": 2.0, "controlnet": 2.0})
    with pytest.raises(SfumatoError, match=r"^controlnet cannot .* what is trained is unet, text_encoder, vae.$"):
        made.init(WEIGHTS)
    with pytest.raises(SfumatoError, match=r"^unet cannot .* what is trained is one whole.$"):
        made.init(jnp.ones(3))
    with pytest.raises(SfumatoError, match="learning rate's factor of unet must lie in"):
        optimizer("sgd", 0.1, steps=5, rates_by={"unet": -1.0})
