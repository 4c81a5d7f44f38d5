"""Autoencoder training: equal to a torch step; the terms of the loss mean what they say."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfumato
from sfumato.errors import SfumatoError
from sfumato.io.fill import fill
from sfumato.train.recipes.autoencoder import COLOURS, Reconstruction, autoencoder, pooled

from oracle import lazy, to_torch
from training import assert_same, batch

SETTINGS = [Reconstruction(kl=1e-3), Reconstruction(l1=0.3, scales=1.0, edges=0.2, kl=1e-2, decorrelated=False)]


def torch_loss(vae: Any, pixels: np.ndarray, noise: np.ndarray, weights: Reconstruction) -> Any:
    import torch
    from torch.nn.functional import avg_pool2d

    target = to_torch(pixels)
    posterior = vae.encode(target).latent_dist
    off = vae.decode(posterior.mean + posterior.std * to_torch(noise)).sample - target
    if weights.decorrelated:
        off = torch.einsum("dc,bchw->bdhw", torch.tensor(COLOURS), off)
    edges = (off[:, :, 1:] - off[:, :, :-1]).abs().mean() + (off[..., 1:] - off[..., :-1]).abs().mean()
    scales = sum(avg_pool2d(off, size).abs().mean() for size in (2, 4, 8)) / 3
    return (
        weights.l1 * off.abs().mean() + weights.scales * scales + weights.edges * edges / 2
        + weights.kl * posterior.kl().mean()
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("weights", SETTINGS)
def test_loss_and_gradients_are_the_references(pair, weights):
    both, data, key = pair("sd1"), batch(), jax.random.key(3)
    vae = copy.deepcopy(both.pipeline.vae).train()
    loss = torch_loss(vae, data["pixels"], np.asarray(jax.random.normal(key, (3, 8, 8, 4))), weights)
    loss.backward()
    task = autoencoder(both.model, weights, remat=True)
    step = jax.jit(jax.value_and_grad(task.loss, has_aux=True))
    (ours, terms), gradients = step(task.trainable, task.frozen, task.collate(data), key)
    assert float(ours) == pytest.approx(loss.item(), rel=1e-4)
    assert terms.keys() == {"l1", "scales", "edges", "kl", "psnr"}
    theirs = fill(task.trainable["vae"], lazy({name: p.grad for name, p in vae.named_parameters()}))
    assert_same(gradients, {"vae": theirs})


def test_pooling_is_the_mean_of_squares():
    x = jnp.arange(2 * 5 * 4 * 1.0).reshape(2, 5, 4, 1)
    np.testing.assert_allclose(pooled(x, 2)[0, 0, 0, 0], np.mean([0, 1, 4, 5]))
    assert pooled(x, 2).shape == (2, 2, 2, 1)


def test_green_errors_count_more_in_decorrelated_colours():
    matrix = np.array(COLOURS)
    grey, green = (np.abs(matrix @ np.array(off)).sum() for off in ((1, 1, 1), (0, 1, 0)))
    assert np.abs(matrix @ np.ones(3))[1:].max() == 0
    assert green > grey


@pytest.mark.slow
def test_it_learns_a_picture_from_scratch_and_exports(models, tmp_path):
    model = models("sd1")
    task = autoencoder(model, scratch=True, seed=1)
    optimizer = optax.adam(3e-3)
    data = task.collate({"pixels": np.broadcast_to(batch()["pixels"][:, :1, :1], (3, 16, 16, 3))})

    @jax.jit
    def update(trained: Any, state: Any, key: jax.Array) -> Any:
        (loss, _), gradients = jax.value_and_grad(task.loss, has_aux=True)(trained, {}, data, key)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state, loss

    trained, losses = task.trainable, []
    state = optimizer.init(trained)
    for step in range(60):
        trained, state, loss = update(trained, state, jax.random.key(step))
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 3
    task.export(trained, tmp_path / "out")
    again = sfumato.load(tmp_path / "out")
    np.testing.assert_array_equal(again.vae.decoder.conv_in.kernel[...], trained["vae"].decoder.conv_in.kernel[...])


def test_negative_weights_are_refused():
    with pytest.raises(SfumatoError, match="negative"):
        Reconstruction(kl=-1)
