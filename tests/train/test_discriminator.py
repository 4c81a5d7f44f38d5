"""The discriminator is that of torch, and its loss gives each side its own gradients alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.models.layers import abstract
from sfumato.train.discriminator import Adversarial, DiscriminatorConfig, PatchDiscriminator, hinge
from train.judging import TINY, sides, torch_judge, verdicts

from oracle import assert_close, fill_from_torch, fresh, from_torch, to_torch


def pictures(seed: int, rows: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (rows, 16, 20, 3)).astype(np.float32)


@pytest.mark.parity
def test_verdicts_and_losses_are_the_references():
    judge, pixels, rebuilt = torch_judge(), pictures(0), pictures(1)

    @jax.jit
    def run(net: PatchDiscriminator, rebuilt: jax.Array, pixels: jax.Array) -> Any:
        return Adversarial(0.5)(net, rebuilt, pixels), net(pixels), net(pixels[1:2])

    net = fill_from_torch(PatchDiscriminator, TINY, judge)
    (loss, told), ours, alone = run(net, jnp.asarray(rebuilt), jnp.asarray(pixels))
    assert_close(ours, from_torch(verdicts(judge, to_torch(pixels))))
    generator, discriminator = (side.item() for side in sides(judge, to_torch(rebuilt), to_torch(pixels)))
    assert float(told["generator"]) == pytest.approx(generator, rel=1e-4)
    assert float(told["discriminator"]) == pytest.approx(discriminator, rel=1e-4)
    assert float(loss) == pytest.approx(0.5 * generator + discriminator, rel=1e-4)
    # It does not depend on the pictures beside, as it would with statistics of the batch.
    assert_close(alone, ours[1:2], tol=1e-6)


def test_each_side_gets_its_own_gradients_alone():
    net, pixels, rebuilt = fresh(PatchDiscriminator, TINY), jnp.asarray(pictures(0)), jnp.asarray(pictures(1))

    @jax.jit
    def gradients(net, rebuilt):
        term = Adversarial(0.3, start=2)
        both = [jax.grad(lambda *x, at=step: term(*x, pixels, at)[0], (0, 1))(net, rebuilt) for step in (1, 2)]
        generator = jax.grad(lambda rebuilt: -0.3 * net(rebuilt).mean())(rebuilt)
        discriminator = jax.grad(lambda net: hinge(net(pixels), net(rebuilt)))(net)
        return *both, (discriminator, generator)

    before, ours, alone = gradients(net, rebuilt)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(before))
    for one, other in zip(*map(jax.tree.leaves, (ours, alone)), strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7 * np.abs(other).max())


def test_hinge_asks_for_a_margin():
    verdict = jnp.array([3.0, 1.0, 0.0, -1.0])[:, None, None, None]
    assert float(hinge(verdict, verdict - 4)) == pytest.approx((0 + 0 + 1 + 2) / 8)


def shape(net: PatchDiscriminator, pixels: Any) -> Any:
    return jax.eval_shape(lambda net, pixels: net(pixels), net, pixels)


def test_sizes():
    assert DiscriminatorConfig().widths == (64, 128, 256, 512)
    assert DiscriminatorConfig(8, 5, 8).widths[-1] == 64
    net = abstract(PatchDiscriminator, DiscriminatorConfig())
    assert shape(net, jnp.zeros((2, 64, 48, 3))).shape == (2, 6, 4, 1)
    assert net.blocks[2].conv.kernel.shape == (4, 4, 256, 512)


def test_bad_input_is_one_sentence():
    with pytest.raises(SfumatoError, match="24 x 24 pixels or more, and these have 64 x 16"):
        shape(abstract(PatchDiscriminator, DiscriminatorConfig()), jnp.zeros((1, 16, 64, 3)))
    for settings, message in (({"width": 24}, "does not divide"), ({"layers": 0}, "1 or more")):
        with pytest.raises(SfumatoError, match=message):
            DiscriminatorConfig(**settings)
    for settings in ({"weight": -1.0}, {"weight": float("nan")}, {"start": -1}):
        with pytest.raises(SfumatoError, match="0 or more"):
            Adversarial(**settings)
