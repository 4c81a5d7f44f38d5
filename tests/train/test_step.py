"""What a step tells its loss; the rest is tested where steps are made, in test_fit.py."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfumato.train.step import Step


def test_a_loss_that_asks_for_the_step_is_told():
    def loss(trained, frozen, batch, key, step=0):
        return (step >= 2) * (trained * batch["x"].mean()), {"step": jnp.float32(step)}

    seed = jnp.uint32(0)
    for accumulate in (1, 2):
        step = Step(loss, optax.with_extra_args_support(optax.sgd(1.0)), accumulate, None, None)
        state, run = step.begin(jnp.float32(0)), jax.jit(lambda *arguments, step=step: step(*arguments))
        rows, weights = jnp.ones((accumulate, 4)), []
        for number in range(4):
            state, told = run(state, (), {"x": rows}, jnp.zeros((1, 1), jnp.int32), seed)
            assert float(told["step"]) == number
            weights.append(float(state.trainable))
        np.testing.assert_array_equal(weights, [0, 0, -1, -2])
