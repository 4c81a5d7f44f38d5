"""Autoencoder training: equal to torch steps, with a discriminator and without; what it draws and exports."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfumato
from sfumato import image
from sfumato.errors import SfumatoError
from sfumato.io.fill import fill
from sfumato.train.discriminator import Adversarial
from sfumato.train.own import RECIPES
from sfumato.train.recipes.autoencoder import autoencoder
from sfumato.train.reconstruction import COLOURS, Reconstruction
from sfumato.train.samples import Sampling
from train.judging import TINY, sides, torch_judge, torch_loss

from oracle import lazy, to_torch
from training import assert_same, batch

WEIGHTS = Reconstruction(l1=0.5, kl=1e-3)
JUDGED = Adversarial(0.3, start=70, discriminator=TINY)
# A larger epsilon than usual: gradients that are zero but for rounding would otherwise decide on full steps.
ADAM = {"eps": 1e-4, "weight_decay": 0.01}


@pytest.fixture(scope="module")
def program(models):
    """A task with all terms, its optimizer, and the program of a step of both."""
    task, optimizer = autoencoder(models("sd1"), WEIGHTS, JUDGED, remat=True), optax.adamw(1.0, **ADAM)

    @jax.jit
    def update(trained: Any, state: Any, data: Any, step: int, rate: float) -> Any:
        key = jax.random.key(step)
        (loss, terms), gradients = jax.value_and_grad(task.loss, has_aux=True)(trained, {}, data, key, step)
        updates, state = optimizer.update(gradients, state, trained)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(trained, updates), state, terms | {"loss": loss}, gradients

    return task, optimizer, update


def torch_step(vae: Any, judge: Any, pixels: Any, noise: np.ndarray) -> float:
    """The sum of all losses; both networks have the gradients of their own loss then."""
    import torch

    vae.zero_grad()
    judge.zero_grad()
    posterior = vae.encode(pixels).latent_dist
    rebuilt = vae.decode(posterior.mean + posterior.std * to_torch(noise)).sample
    off = torch.einsum("dc,bchw->bdhw", torch.tensor(COLOURS), rebuilt - pixels)
    loss = torch_loss(off, WEIGHTS) + WEIGHTS.kl * posterior.kl().mean()
    generator, discriminator = sides(judge, rebuilt, pixels)
    loss = loss + JUDGED.weight * generator
    loss.backward(inputs=list(vae.parameters()))
    discriminator.backward(inputs=list(judge.parameters()))
    return (loss + discriminator).item()


@pytest.mark.slow
@pytest.mark.parity
def test_five_steps_are_the_references(pair, program):
    import torch

    task, optimizer, update = program
    nets = {"discriminator": torch_judge(), "vae": copy.deepcopy(pair("sd1").pipeline.vae).train()}
    assert task.trainable.keys() == nets.keys()

    def as_ours(values: str) -> dict[str, Any]:
        """Weights ("data") or gradients ("grad") of the torch networks as ours."""
        named = {name: {key: getattr(p, values) for key, p in net.named_parameters()} for name, net in nets.items()}
        return {name: fill(task.trainable[name], lazy(found)) for name, found in named.items()}

    trained = as_ours("data")
    state = optimizer.init(trained)
    theirs = torch.optim.AdamW([p for net in nets.values() for p in net.parameters()], 1e-3, **ADAM)
    for number in range(5):
        data, step = batch(number), JUDGED.start + number
        noise = np.asarray(jax.random.normal(jax.random.key(step), (3, 8, 8, 4)))
        expected = torch_step(nets["vae"], nets["discriminator"], to_torch(data["pixels"]), noise)
        gradients = as_ours("grad")
        theirs.step()
        trained, state, terms, ours = update(trained, state, task.collate(data), step, 1e-3)
        assert float(terms["loss"]) == pytest.approx(expected, rel=1e-4)
        if number == 0:
            assert_same(ours, gradients)
    assert_same(trained, as_ours("data"))
    told = {"l1", "scales", "edges", "kl", "psnr", "reconstruction", "generator", "discriminator"}
    assert terms.keys() == told | {"loss"}


@pytest.mark.slow
def test_it_learns_a_picture_from_scratch_and_exports(program, models, tmp_path):
    _, optimizer, update = program
    task = autoencoder(models("sd1"), WEIGHTS, JUDGED, scratch=True, seed=1, remat=True)
    data = task.collate({"pixels": np.broadcast_to(batch()["pixels"][:, :1, :1], (3, 16, 16, 3))})
    trained, losses, judges = task.trainable, [], []
    state = optimizer.init(trained)
    for step in range(72):
        trained, state, terms, gradients = update(trained, state, data, step, 4e-3)
        losses.append(float(terms["reconstruction"]))
        judges.append(any(np.any(leaf) for leaf in jax.tree.leaves(gradients["discriminator"])))
    assert losses[69] < losses[0] / 3
    assert judges == [False] * 70 + [True] * 2
    task.export(trained, tmp_path / "out")
    assert not [file for file in (tmp_path / "out").rglob("*") if "discriminator" in file.name]
    again = sfumato.load(tmp_path / "out")
    np.testing.assert_array_equal(again.vae.decoder.conv_in.kernel[...], trained["vae"].decoder.conv_in.kernel[...])


def test_without_weight_there_is_no_discriminator(models):
    task = autoencoder(models("sd1"), adversarial=Adversarial(0.0))
    assert task.trainable.keys() == {"vae"}
    key, pixels = jax.random.key(0), jnp.zeros((1, 16, 16, 3))
    programs = [
        str(jax.make_jaxpr(other.loss)(task.trainable, {}, {"pixels": pixels}, key))
        for other in (task, autoencoder(models("sd1")))
    ]
    assert programs[0] == programs[1]


@pytest.mark.slow
def test_the_decoder_alone(models, tmp_path):
    """The loss and the decoder's gradients are those of the whole; what makes latents stays, bit for bit."""
    model = models("sd1")
    task, all_of_it = autoencoder(model, WEIGHTS, decoder=True, remat=True), autoencoder(model, WEIGHTS)
    assert task.trainable.keys() == {"decoder", "post_quant_conv"}
    data, key = task.collate(batch()), jax.random.key(0)
    step = jax.jit(lambda task_loss, *a: jax.value_and_grad(task_loss, has_aux=True)(*a), static_argnums=0)
    (loss, _), gradients = step(task.loss, task.trainable, task.frozen, data, key)
    (expected, _), whole = step(all_of_it.loss, all_of_it.trainable, {}, data, key)
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    assert_same(gradients, {name: getattr(whole["vae"], name) for name in gradients})
    task.export(jax.tree.map(lambda a: a + 0.5, task.trainable), tmp_path / "out")
    again = sfumato.load(tmp_path / "out", dtype="float32").vae
    for mine, theirs in zip(
        *(jax.tree.leaves([vae.encoder, vae.quant_conv]) for vae in (again, model.vae)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
    changed = np.asarray(model.vae.decoder.conv_in.kernel[...]) + 0.5
    np.testing.assert_allclose(again.decoder.conv_in.kernel[...], changed, rtol=1e-6)


@pytest.mark.parametrize("other", [{"scratch": True}, {"standardise": 3}])
def test_what_does_not_go_with_the_decoder_alone(other):
    with pytest.raises(SfumatoError, match="no --scratch and no --standardise"):
        RECIPES["autoencoder"](decoder=True, **other).arguments("float32")


@pytest.mark.slow
def test_it_draws_what_is_left_of_pictures(models, tmp_path, compiled):
    model, rng = models("sd1"), np.random.default_rng(0)
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for name, size in zip(names, ((16, 16), (40, 20)), strict=True):
        image.write(image.read(rng.integers(0, 255, (*size, 3), np.uint8)), name)
    task = autoencoder(model, remat=True)
    drawn = task.draw(task.trainable, Sampling((), tuple(names), size=(16, 16)))
    assert [picture.size for picture in drawn] == [(16, 16)] * 2
    pixels = image.to_array(names[0])[None]
    expected = jax.jit(lambda vae, pixels: vae.decode(vae.encode(pixels)))(model.vae, pixels)
    np.testing.assert_allclose(drawn[0].array, np.asarray(expected[0].clip(-1, 1) + 1) * 127.5, atol=0.51)
    compiled.clear()
    changed = jax.tree.map(lambda a: a * 0.9, task.trainable)
    assert np.any(task.draw(changed, Sampling((), (names[0],), size=(16, 16)))[0].array != drawn[0].array)
    assert not [name for name in compiled if name in ("_encode", "decode")]
    with pytest.raises(SfumatoError, match="multiples of 2"):
        task.draw(task.trainable, Sampling((), (names[0],), size=(17, 16)))
