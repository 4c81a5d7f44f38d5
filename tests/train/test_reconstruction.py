"""The terms of the autoencoder's loss mean what they say; in decorrelated colours torch computes it in recipes/."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import SfumatoError
from sfumato.models.vae import Gaussian
from sfumato.train.reconstruction import COLOURS, Reconstruction, pooled
from train.judging import torch_loss

from oracle import to_torch


@pytest.mark.parity
def test_the_loss_in_plain_colours_is_the_references():
    rng, weights = np.random.default_rng(0), Reconstruction(l1=0.3, scales=1.0, edges=0.2, kl=1e-2, decorrelated=False)
    rebuilt, pixels = rng.uniform(-1, 1, (2, 2, 18, 20, 3)).astype(np.float32)
    posterior = Gaussian(*jnp.asarray(rng.standard_normal((2, 2, 9, 10, 4)), jnp.float32))
    loss, terms = weights(jnp.asarray(rebuilt), jnp.asarray(pixels), posterior)
    expected = torch_loss(to_torch(rebuilt - pixels), weights).item() + 1e-2 * float(posterior.kl().mean())
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert float(terms["psnr"]) == pytest.approx(10 * np.log10(4 / np.mean((rebuilt - pixels) ** 2)), rel=1e-5)


def test_pooling_is_the_mean_of_squares():
    x = jnp.arange(2 * 5 * 4 * 1.0).reshape(2, 5, 4, 1)
    np.testing.assert_allclose(pooled(x, 2)[0, 0, 0, 0], np.mean([0, 1, 4, 5]))
    assert pooled(x, 2).shape == (2, 2, 2, 1)


def test_green_errors_count_more_in_decorrelated_colours():
    matrix = np.array(COLOURS)
    grey, green = (np.abs(matrix @ np.array(off)).sum() for off in ((1, 1, 1), (0, 1, 0)))
    assert np.abs(matrix @ np.ones(3))[1:].max() == 0
    assert green > grey


def test_negative_weights_are_refused():
    with pytest.raises(SfumatoError, match="negative"):
        Reconstruction(kl=-1)
