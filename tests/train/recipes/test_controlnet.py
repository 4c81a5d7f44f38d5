"""ControlNet training: starts without any effect, equal to a torch step, learns to obey."""

from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sfumato
from sfumato.errors import MismatchError, SfumatoError
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.controlnet import ControlNet
from sfumato.models.unet import UNet
from sfumato.train import own as settings
from sfumato.train.consistency import Consistency
from sfumato.train.denoising import cache
from sfumato.train.recipes.controlnet import controlnet, from_unet
from sfumato.train.recipes.text_to_image import text_to_image
from sfumato.types import Conditioning
from train import toy
from train.judging import torch_consistency

from models.tiny import UNETS
from oracle import fresh, to_torch
from pipelines import nets
from training import Reference, assert_parity, batch, clean, draws, leaves, our_step

pytestmark = pytest.mark.slow
KINDS = ["sd1", "sdxl"]
STEPS = 120


def steered(reference: Reference, data: Any, drawn: Any, noisy: Any, t: Any, seen: Any) -> dict[str, Any]:
    """What the torch ControlNet adds to the arguments of the UNet."""
    image = to_torch(data["conditioning"])
    down, mid = reference.part("controlnet")(noisy, t, controlnet_cond=image, return_dict=False, **seen)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_five_steps_are_those_of_the_reference(pair, kind):
    both = pair(kind, small=True)
    ((theirs, ours),) = nets(kind, small=True)
    reference = Reference(both.pipeline, {"controlnet": theirs}, extend=steered)
    assert_parity(controlnet(both.model, ours, remat=True), reference, draws(5))


@pytest.mark.parity
@pytest.mark.parametrize("own", [False, True])
def test_five_steps_with_pictures_compared_are_those_of_the_reference(pair, own):
    """The first row alone is looked at; its time never is so late that the clean latents are a guess."""
    import torch

    both = pair("sd1", small=True)
    ((theirs, ours),) = nets("sd1", small=True)
    weights = Consistency(edges=0.7, colours=0.4, own=own)

    def further(
        reference: Reference, scheduler: Any, data: Any, drawn: Any, noisy: Any, output: Any, latents: Any
    ) -> Any:
        noisy, output, t = noisy[:1], output[:1], to_torch(drawn.t)[:1].long()
        if own:
            with torch.no_grad():
                noisy = scheduler.add_noise(clean(scheduler, output, noisy, t), output, t // 2)
            t = t // 2
            first = {name: rows[:1] for name, rows in data.items()}
            output = reference.predict(first, jax.tree.map(lambda a: a[:1], drawn), noisy, t)
        vae = reference.part("vae")
        compared = (clean(scheduler, output, noisy, t), latents[:1])
        made, real = (vae.decode(each / vae.config.scaling_factor).sample for each in compared)
        return torch_consistency(made, real, weights)

    reference = Reference(both.pipeline, {"controlnet": theirs}, extend=steered, further=further)
    assert_parity(controlnet(both.model, ours, consistency=weights), reference, draws(5))


def test_only_every_so_many_rows_are_compared(models):
    model, (drawn,), data = models("sd1"), draws(), batch()
    net = fresh(ControlNet, from_unet(model.unet, model.vae.factor).config)
    other = data | {"conditioning": np.concatenate([data["conditioning"][:2], 1 - data["conditioning"][2:]])}

    def found(every: int) -> list[float]:
        task = controlnet(model, net, consistency=Consistency(edges=1.0, every=every, own=True))
        step = our_step(task, [drawn])
        return [float(step(task.trainable, each)[0][1]["edges"]) for each in (data, other)]

    one, another = found(2)  # the first row and the third
    assert one != pytest.approx(another, rel=1e-6)
    one, another = found(3)  # the first
    assert one == pytest.approx(another, rel=1e-6)


@pytest.mark.parametrize("cached", [False, True])
def test_consistency_adds_its_terms_and_changes_nothing_else(models, cached):
    model, (drawn,) = models("sd1"), draws()
    data = batch()
    data = cache(model, data) if cached else data

    def terms(consistency: Consistency | None) -> dict[str, float]:
        task = controlnet(model, consistency=consistency, cached=cached)
        (loss, found), _ = our_step(task, [drawn])(task.trainable, data)
        return {name: float(value) for name, value in found.items()} | {"loss": float(loss)}

    plain, further = terms(None), terms(Consistency(edges=2.0, colours=3.0, every=1))
    assert further["edges"] > 0 < further["colours"]
    assert further["mse"] == pytest.approx(plain["mse"], rel=1e-5)
    expected = plain["loss"] + 2 * further["edges"] + 3 * further["colours"]
    assert further["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_start_is_the_references_but_for_what_is_random(saved, loaded, kind):
    from diffusers import ControlNetModel

    theirs = ControlNetModel.from_unet(saved(kind)[1].unet, conditioning_embedding_out_channels=(16, 256))
    ours = from_unet(loaded(kind).unet, factor=2)
    from sfumato.io.fill import fill

    from oracle import lazy

    wanted = leaves({"": fill(ours, lazy(theirs.state_dict()))})
    for path, value in leaves({"": ours}).items():
        assert value.shape == wanted[path].shape
        if path[1] != "controlnet_cond_embedding":
            np.testing.assert_array_equal(value, wanted[path], err_msg=str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_nothing_changes_exactly(models, kind):
    model, data = models(kind), batch()
    net = from_unet(model.unet, model.vae.factor)
    rng = np.random.default_rng(0)
    x, t = jnp.asarray(rng.standard_normal((3, 8, 8, 4)), jnp.float32), jnp.array([1.0, 500.0, 900.0])
    config = model.unet.config
    cond = Conditioning(jnp.asarray(rng.standard_normal((3, 7, config.cross_attention_dim)), jnp.float32))
    if kind == "sdxl":
        cond = dc.replace(cond, pooled=jnp.ones((3, 20)), time_ids=jnp.asarray(data["sizes"]))
    residuals = jax.jit(lambda net: net(x, t, cond, jnp.asarray(data["conditioning"])))(net)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(residuals))
    predict = jax.jit(lambda unet, cond: unet(x, t, cond).eps)
    np.testing.assert_array_equal(
        predict(model.unet, cond), predict(model.unet, dc.replace(cond, residuals=residuals))
    )  # fmt: skip


def test_the_loss_at_the_start_is_the_models_and_only_zero_convolutions_learn(models):
    model, data, drawn = models("sd1"), batch(), draws()
    plain, task = text_to_image(model), controlnet(model)
    without = our_step(plain, drawn, gradients=False)(plain.trainable, data)
    (loss, _), gradients = our_step(task, drawn)(task.trainable, data)
    assert float(loss) == pytest.approx(float(without), rel=1e-6)  # two programs: they may round differently
    for path, gradient in leaves(gradients).items():
        first = path[1] in ("controlnet_down_blocks", "controlnet_mid_block")
        assert np.any(gradient) == first, path


def test_of_further_channels_the_start_takes_none():
    unet = fresh(UNet, from_dict(UNetConfig, UNETS["sd1-inpaint"]))
    net = from_unet(unet)
    np.testing.assert_array_equal(net.conv_in.kernel[...], unet.conv_in.kernel[:, :, :4])
    assert net.config.conditioning_embedding_out_channels == (16, 32, 96, 256)


def test_the_layers_that_read_the_control_picture_may_be_narrow(models, tmp_path):
    model = models("sd1")
    controlnet(model, hint=3).export(controlnet(model, hint=3).trainable, tmp_path / "net")
    again = sfumato.load_controlnet(tmp_path / "net")
    assert again.config.conditioning_embedding_out_channels == (3, 48)
    assert again.controlnet_cond_embedding.conv_in.kernel.shape[-1] == 3


def colours(rng: np.random.Generator, rows: int = 8) -> dict[str, Any]:
    """Pictures (as latents) of one colour, which the control picture shows and the caption does not tell."""
    hue = rng.uniform(-1, 1, (rows, 1, 1, 3)).astype(np.float32)
    return {
        "latents": np.tile(np.concatenate([hue, hue[..., :1]], -1), (1, 4, 4, 1)),
        "conditioning": np.tile((hue + 1) / 2, (1, 8, 8, 1)), "text": ["a colour"] * rows,
    }  # fmt: skip


def test_after_training_the_control_is_obeyed(tmp_path):
    """In one step out of pure noise, most of what `generate` draws is what the control picture says."""
    model = toy.blank()
    task = controlnet(model)
    optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, STEPS))
    trained, rng = task.trainable, np.random.default_rng(0)
    state = optimizer.init(trained)

    @jax.jit
    def update(trained: Any, state: Any, frozen: Any, data: Any, key: jax.Array) -> Any:
        gradients, _ = jax.grad(task.loss, has_aux=True)(trained, frozen, data, key)
        updates, state = optimizer.update(gradients, state, trained)
        return optax.apply_updates(trained, updates), state

    for step in range(STEPS):
        trained, state = update(trained, state, task.frozen, task.collate(colours(rng)), jax.random.key(step))

    test = colours(np.random.default_rng(9), 32)

    def explained(folder: Any, pictures: np.ndarray) -> float:
        """The share of the variance of the pictures' colours that is told rightly; below 0 is worse than the mean."""
        control = sfumato.ControlNet(sfumato.load_controlnet(folder), list(np.uint8(pictures * 255)))
        drawn = sfumato.generate(
            model, "a colour", count=32, steps=1, size=(8, 8), sampler="ddim", controls=[control], output="latents"
        )
        wanted = test["latents"].mean((1, 2))
        return 1 - float(np.square(np.asarray(drawn).mean((1, 2)) - wanted).mean() / wanted.var(0).mean())

    task.export(task.trainable, tmp_path / "start")
    task.export(trained, tmp_path / "end")
    right = test["conditioning"]
    before, after = explained(tmp_path / "start", right), explained(tmp_path / "end", right)
    others = explained(tmp_path / "end", np.roll(right, 1, axis=0))
    print(f"explained before {before:.2f}, after {after:.2f}, by the control pictures of others {others:.2f}")
    assert before < 0.1
    assert after > 0.6
    assert others < 0


def test_export_is_a_controlnet_that_loads(models, tmp_path):
    model = models("sd1")
    task = controlnet(model)
    task.export(jax.tree.map(lambda a: a + 1, task.trainable), tmp_path / "net")
    again = sfumato.load_controlnet(tmp_path / "net")
    assert np.all(np.asarray(again.controlnet_mid_block.kernel[...]) == 1)
    assert not np.any(task.trainable["controlnet"].controlnet_mid_block.kernel[...])


def test_bad_input_is_one_sentence(models):
    model = models("sd1")
    net = functools.partial(from_unet, model.unet)
    with pytest.raises(SfumatoError, match="8 times smaller"):
        controlnet(model, net(8))
    with pytest.raises(MismatchError, match="does not fit"):
        controlnet(models("sdxl"), net(2))
    with pytest.raises(SfumatoError, match="needs conditioning"):
        controlnet(model).collate({"pixels": batch()["pixels"], "text": ["a"]})
    with pytest.raises(SfumatoError, match="no --hint-channels beside"):
        settings.ControlNet(net="a net", hint=8).arguments("float32")
    assert settings.ControlNet().arguments("float32")["consistency"] is None
    assert settings.ControlNet(edges=2.0).arguments("float32")["consistency"] == Consistency(edges=2.0)
    both = settings.ControlNet(colours=2.0, own=True).arguments("float32")["consistency"]
    assert both == Consistency(colours=2.0, own=True)
    with pytest.raises(SfumatoError, match="so it needs --consistent-edges or --consistent-colours"):
        settings.ControlNet(own=True).arguments("float32")
    with pytest.raises(SfumatoError, match="at least 1 channel, not 0"):
        controlnet(model, hint=0)
    with pytest.raises(SfumatoError, match="9"):
        controlnet(models("sd1-inpaint"))
