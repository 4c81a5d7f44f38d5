"""What the tests of recipes that adapt a model share: comparing by names, learning a picture, what must not change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax

from sfumato.model import Model
from sfumato.train.objective import Draws
from sfumato.train.task import Task

from training import batch, our_step


def step(task: Task, trainable: Any, data: Mapping[str, Any], draws: Draws) -> tuple[float, Any]:
    """The loss of a batch of the data, and its gradient."""
    (loss, _), gradient = our_step(task, [draws])(trainable, data)
    return float(loss), jax.tree.map(np.asarray, gradient)


def assert_step(ours: tuple[float, Mapping[str, Any]], loss: Any, theirs: Mapping[str, Any]) -> None:
    """The same loss and, by name, the same gradients: to 1e-4 of the largest number of each."""
    assert ours[0] == np.float32(loss.detach()) or abs(ours[0] / float(loss.detach()) - 1) <= 1e-4
    assert ours[1].keys() == theirs.keys()
    for name, gradient in theirs.items():
        gradient = gradient.numpy()
        assert np.abs(gradient).max() > 0, name
        assert np.abs(ours[1][name] - gradient).max() <= 1e-4 * np.abs(gradient).max(), name


def one_picture(rows: int = 3) -> dict[str, Any]:
    """A batch of the data that is one picture several times."""
    data = batch(seed=3, rows=1)
    return {name: value * rows if isinstance(value, list) else value.repeat(rows, 0) for name, value in data.items()}


def learned(task: Task, data: Mapping[str, Any], steps: int, rate: float) -> tuple[Any, float, float]:
    """What comes out of some steps of Adam with new draws in each, and the loss with fixed draws before and after."""
    optimizer, collated = optax.adam(rate), task.collate(data)
    run = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    keys = [jax.random.key(1000 + i) for i in range(8)]

    def figure(trained: Any) -> float:
        return float(np.mean([run(trained, task.frozen, collated, key)[0][0] for key in keys]))

    @jax.jit
    def update(gradient: Any, state: Any, trained: Any) -> tuple[Any, Any]:
        change, state = optimizer.update(gradient, state, trained)
        return optax.apply_updates(trained, change), state

    trained, before = task.trainable, figure(task.trainable)
    state = optimizer.init(trained)
    for number in range(steps):
        _, gradient = run(trained, task.frozen, collated, jax.random.key(number))
        trained, state = update(gradient, state, trained)
    return jax.tree.map(np.asarray, trained), before, figure(trained)


def numbers(model: Model) -> list[np.ndarray]:
    """Copies of all numbers of a model."""
    return [np.array(leaf) for leaf in jax.tree.leaves([model.unet, model.vae, dict(model.text_encoders)])]


def same_numbers(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
