"""The ControlNet against the torch reference."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.models.config import ControlNetConfig, UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.types import Residuals

from models.test_unet import added_conditions, conditioning, inputs
from models.tiny import CONTROLNETS, UNETS
from oracle import assert_close, fill_from_torch, from_torch, seeded, to_torch


def control_inputs(name: str):
    config = from_dict(ControlNetConfig, CONTROLNETS[name])
    base = {"sdxl": "sdxl", "sd2": "sd2"}.get(name, "sd1")
    values = inputs(from_dict(UNetConfig, UNETS[base]))
    shape = (2, 64, 64, config.conditioning_channels)
    return config, values, np.random.default_rng(3).random(shape, np.float32)


def evaluate(net: ControlNet, values: dict, image: np.ndarray) -> Residuals:
    x, t = jnp.asarray(values["x"]), jnp.asarray(values["t"])
    return jax.jit(lambda net, *inputs: net(*inputs))(net, x, t, conditioning(values), jnp.asarray(image))


@pytest.mark.parity
@pytest.mark.parametrize("name", CONTROLNETS)
def test_residuals_equal_the_reference(name):
    import torch
    from diffusers import ControlNetModel

    theirs = seeded(lambda: ControlNetModel(**CONTROLNETS[name]))
    config, values, image = control_inputs(name)
    ours = fill_from_torch(ControlNet, config, theirs)
    got = jax.jit(lambda m, *a: m(*a))(
        ours, jnp.asarray(values["x"]), jnp.asarray(values["t"]), conditioning(values), jnp.asarray(image)
    )
    added = added_conditions(values)
    want = theirs(
        to_torch(values["x"]),
        torch.tensor(501.0),
        to_torch(values["context"]),
        to_torch(image),
        added_cond_kwargs=added,
    )
    assert len(got.down) == len(want.down_block_res_samples)
    for a, b in zip((*got.down, got.mid), (*want.down_block_res_samples, want.mid_block_res_sample), strict=True):
        assert_close(a, from_torch(b))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_new_net_adds_exactly_nothing(name):
    config, values, image = control_inputs(name)
    net = ControlNet(config, rngs=nnx.Rngs(0))
    got = jax.jit(lambda m, *a: m(*a))(
        net, jnp.asarray(values["x"]), jnp.asarray(values["t"]), conditioning(values), jnp.asarray(image)
    )
    assert all(not r.any() for r in (*got.down, got.mid))
