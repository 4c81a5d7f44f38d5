"""Self-Attention Guidance against the torch pipeline, against the paper's equations, and on models the former lacks."""

from __future__ import annotations

import dataclasses as dc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, SAG, SfumatoError, Window
from sfumato.controls.base import Env
from sfumato.controls.blur import blurred
from sfumato.controls.sag import DEVIATION, MIDDLE, RADIUS, attended
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.samplers.base import make_table
from sfumato.schedule import PREDICTIONS, to_eps, to_output, to_x0
from sfumato.types import Conditioning, Prediction, pytree

from models.tiny import SD1, SDXL, UNETS
from oracle import assert_close, to_torch
from pipelines import KINDS, nets
from runs import NEGATIVE, PROMPT, SIZE, mask, noise, picture

ORACLE = "StableDiffusionSAGPipeline"
GUIDED = [CFG(5.0), SAG(0.75)]


# ---- The torch pipeline


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("scale", [0.75, 2.0])
def test_as_the_reference(scale, pair):
    both = pair("sd1").through(ORACLE)
    got = both.ours(controls=[CFG(5.0), SAG(scale)])
    both.assert_same(got, both.theirs(sag_scale=scale))
    assert np.abs(got - both.ours()).max() > 0.05, "SAG did nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_without_classifier_free_guidance(pair):
    both = pair("sd1").through(ORACLE)
    got = both.ours(controls=[SAG(1.5)])
    both.assert_same(got, both.theirs(sag_scale=1.5, guidance_scale=1.0))
    assert np.abs(got - both.ours(controls=())).max() > 0.05, "SAG did nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_several_pictures_that_are_not_square(pair):
    both, prompts, start = pair("sd1").through(ORACLE), [PROMPT, "a blue bird"], noise((2, 12, 20, 4))
    negatives = [NEGATIVE, "dark"]
    got = both.ours(prompts, controls=GUIDED, latents=start, negative=negatives, size=(40, 24))
    want = both.theirs(
        prompts, sag_scale=0.75, latents=to_torch(start), height=24, width=40, negative_prompt=negatives
    )  # fmt: skip
    both.assert_same(got, want)


@pytest.mark.parity
@pytest.mark.slow
def test_velocities_mean_what_the_noise_that_they_stand_for_means(pair, monkeypatch):
    """The reference with a network that gives noise, made of the one that gives velocities."""
    both = pair("sd2")
    scheduler = type(both.pipeline.scheduler).from_config(both.pipeline.scheduler.config, prediction_type="epsilon")
    both = both.through(ORACLE, scheduler=scheduler)
    unet, shares = both.pipeline.unet, scheduler.alphas_cumprod
    forward = unet.forward

    def as_noise(x, t, **kwargs):
        out = forward(x, t, **kwargs)
        return dc.replace(out, sample=(1 - shares[t]).sqrt() * x + shares[t].sqrt() * out.sample)

    monkeypatch.setattr(unet, "forward", as_noise)
    both.assert_same(both.ours(controls=GUIDED), both.theirs(sag_scale=0.75))


@pytree
class OfVelocities(SAG):
    """As the reference has it for v-prediction: the difference of velocities of different latents."""

    def guide(self, env, preds, xs, step, state):
        return super().guide(dc.replace(env, output=lambda x0, eps: preds["uncond"].eps), preds, xs, step, state)


@pytest.mark.parity
@pytest.mark.slow
def test_the_reference_subtracts_velocities(pair):
    both = pair("sd2").through(ORACLE)
    want = both.theirs(sag_scale=0.75)
    both.assert_same(both.ours(controls=[CFG(5.0), OfVelocities(0.75)]), want)
    assert np.abs(both.ours(controls=GUIDED) - want).max() > 0.05, "then nothing is to be said about it"


@pytest.mark.parity
@pytest.mark.slow
def test_sdxl_as_the_reference_would_have_it(pair, monkeypatch):
    """Its middle block is of three transformer blocks. The reference is for SD 1 and 2: its network gets the rest of
    what SDXL is told here."""
    import torch

    both = pair("sdxl")
    context, negative, *pooled = both.pipeline.encode_prompt(PROMPT, negative_prompt=NEGATIVE)
    both = both.through(ORACLE, safety_checker=None, requires_safety_checker=False)
    pooled = torch.cat(pooled[::-1])
    unet, sizes = both.pipeline.unet, torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    forward = unet.forward

    def told(x, t, encoder_hidden_states, **kwargs):  # rows: the negative prompt, and sometimes the prompt
        added = {"text_embeds": pooled[: len(x)], "time_ids": sizes.repeat(len(x), 1)}
        return forward(x, t, encoder_hidden_states, added_cond_kwargs=added)

    monkeypatch.setattr(unet, "forward", told)
    want = both.theirs(
        None, sag_scale=0.75, negative_prompt=None, prompt_embeds=context, negative_prompt_embeds=negative
    )  # fmt: skip
    got = both.ours(controls=GUIDED)
    both.assert_same(got, want)
    assert np.abs(got - both.ours()).max() > 0.05, "SAG did nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_with_a_controlnet(pair, monkeypatch):
    """The degraded latents pass the ControlNet as well. The reference has none: its network brings one along."""
    both, ((net, own),) = pair("sd1").through(ORACLE), nets("sd1")
    unet, image = both.pipeline.unet, to_torch(np.asarray(picture(3), np.float32)[None] / 255)
    forward = unet.forward

    def controlled(x, t, encoder_hidden_states, **kwargs):
        down, mid = net(x, t, encoder_hidden_states, image.repeat(len(x), 1, 1, 1), 0.8, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        return forward(x, t, encoder_hidden_states, **residuals)

    monkeypatch.setattr(unet, "forward", controlled)
    got = both.ours(controls=[*GUIDED, sfumato.ControlNet(own, picture(3), 0.8)])
    both.assert_same(got, both.theirs(sag_scale=0.75))


# ---- The paper's equations


@pytest.mark.parametrize("size", [(8, 8), (5, 9), (6, 5), (12, 7)])
def test_the_blur_is_that_of_the_reference(size):
    from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import gaussian_blur_2d

    with jax.enable_x64(True):
        x = np.random.default_rng(0).standard_normal((2, *size, 4))
        want = gaussian_blur_2d(to_torch(x), kernel_size=9, sigma=1.0).numpy()
        assert_close(
            blurred(jnp.asarray(x), RADIUS, DEVIATION), np.moveaxis(want, 1, -1), 1e-7
        )  # its kernel is of single precision


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (3, 4), (1, 6), (5, 3), (8, 6)])
def test_the_blur_is_a_mean_for_latents_of_any_size(size):
    assert np.allclose(blurred(jnp.full((1, *size, 2), 3.0), RADIUS, DEVIATION), 3.0, atol=1e-5)
    x = jnp.asarray(noise((2, *size, 4)))
    once = blurred(x, RADIUS, DEVIATION)
    assert once.shape == x.shape
    assert (jnp.abs(once).max((1, 2)) <= jnp.abs(x).max((1, 2)) + 1e-6).all()
    np.testing.assert_allclose(blurred(x[:, ::-1], RADIUS, DEVIATION), once[:, ::-1], atol=1e-5)


@pytest.mark.parametrize(
    ("levels", "size"), [(1, (8, 8)), (2, (9, 5)), (3, (13, 22)), (3, (1, 7)), (4, (3, 31)), (4, (2, 1))]
)
def test_the_map_is_laid_out_as_the_middle_block_is(levels, size):
    """Its size is that of the network's own; the mask is that of torch's nearest neighbours."""
    from torch.nn.functional import interpolate

    config = SD1 | {
        "block_out_channels": [32] * levels, "down_block_types": ["DownBlock2D"] * levels,
        "up_block_types": ["UpBlock2D"] * levels, "layers_per_block": 1,
    }  # fmt: skip
    unet = abstract(UNet, from_dict(UNetConfig, config))
    middle = size
    for _ in range(levels - 1):
        middle = tuple((length + 2 - 3) // 2 + 1 for length in middle)  # a convolution of 3, a border of 1, stride 2
    tokens = middle[0] * middle[1]
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, *size, 4), (), (1, 5, 24))]
    maps = jax.eval_shape(lambda unet, x, t, c: unet(x, t, Conditioning(c), {MIDDLE}).taps[MIDDLE], unet, *shapes)
    assert maps.shape == (1, 4, tokens, tokens)

    attention = np.random.default_rng(0).uniform(0, 2 / tokens, (2, 4, tokens, tokens)).astype(np.float32)
    on = (attention.astype(np.float64).mean(1).sum(1) > 1).astype(np.float32).reshape(2, *middle, 1)
    want = interpolate(to_torch(on), size).numpy()
    np.testing.assert_array_equal(attended(jnp.asarray(attention), size), np.moveaxis(want, 1, -1))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("branches", [["cond"], ["cond", "uncond"]])
def test_equation_16_whatever_the_network_predicts(prediction, branches):
    """In noise: eps' = eps(x^) + (1 + s) (eps(x) - eps(x^)), around a make-believe network."""
    with jax.enable_x64(True):
        rng, scale, shape = np.random.default_rng(1), 0.6, (2, 6, 4, 3)
        alpha, sigma = np.cos(0.7), np.sin(0.7)
        columns = [np.array([each]) for each in (500.0, alpha, sigma, 1.0, 0.0)]
        step = jax.tree.map(lambda column: jnp.asarray(column)[0], make_table(*columns).steps)
        mixing, maps = rng.standard_normal((3, 3)), rng.uniform(0, 2 / 24, (2, 2, 24, 24))
        xs = {name: jnp.asarray(rng.standard_normal(shape)) for name in branches}
        asked = []

        def network(x):  # what it predicts, from the noise that it sees in the latents
            eps = jnp.tanh(x @ mixing)
            return to_output((x - sigma * eps) / alpha, eps, alpha, sigma, prediction)

        def evaluate(xs, taps=()):
            asked.append(tuple(xs))
            return {name: Prediction(network(x), {}) for name, x in xs.items()}

        def nothing(*arguments):
            raise AssertionError

        def x0(out, x):
            return to_x0(out, x, alpha, sigma, prediction)

        def eps(out, x):
            return to_eps(out, x, alpha, sigma, prediction)

        env = Env(
            evaluate=evaluate, guided=nothing, x0=x0, eps=eps, advance=nothing,
            output=lambda x0, eps: to_output(x0, eps, alpha, sigma, prediction),
        )  # fmt: skip
        preds = {name: Prediction(network(x), {MIDDLE: jnp.asarray(maps)}) for name, x in xs.items()}
        got, _ = SAG(scale).guide(env, preds, xs, step, ())

        branch = branches[-1]
        x, seen = xs[branch], jnp.tanh(xs[branch] @ mixing)
        clean = (x - sigma * seen) / alpha
        looked_at = (maps.mean(1).sum(1) > 1).reshape(2, 6, 4, 1)
        degraded = alpha * jnp.where(looked_at, blurred(clean, RADIUS, DEVIATION), clean) + sigma * seen
        again = jnp.tanh(degraded @ mixing)
        want = again + (1 + scale) * (seen - again)
        assert_close(eps(preds[branch].eps + got, x), want, 1e-12)
        assert asked
        assert set(asked) == {(branch,)}


# ---- Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_with_everything(kind, pair):
    """Beside ControlNet, inpainting and perturbed attention, of latents that no level halves evenly."""
    both, ((_, own),) = pair(kind, small=True), nets(kind, small=True)
    size, start = (22, 18), noise((1, 9, 11, 4))
    inpaint = sfumato.Inpaint(picture(size=size), mask(size))
    others = [CFG(5.0), sfumato.ControlNet(own, picture(3, size), 0.8), sfumato.PAG(2.0), inpaint]
    without = both.ours(controls=others, latents=start, size=size)
    got = both.ours(controls=[*others, SAG(0.75)], latents=start, size=size)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:, :, :5], without[:, :, :5])  # what inpainting keeps
    assert np.abs(got - without).max() > 0.01, "SAG did nothing"


@pytest.mark.slow
def test_the_sampler_does_not_matter(pair):
    """Euler's method in sigma / alpha is DDIM, with other latents where the reference evaluates those it blurs."""
    model = pair("sd1", small=True).model
    both = dc.replace(pair("sd1"), model=dc.replace(model, schedule=dc.replace(model.schedule, set_alpha_to_one=True)))
    assert_close(both.ours(controls=GUIDED, sampler="euler"), both.ours(controls=GUIDED, sampler="ddim"), 1e-4)


# ---- Bad input


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "message"), [
    ({"scale": float("nan")}, "SAG's scale must be a finite number, not nan."),
    ({"scale": "much"}, "SAG's scale must be a number, not 'much'."),
    ({"window": Window(0.8, 0.2)}, "The window of SAG starts at 0.8 and stops before that, at 0.2."),
])  # fmt: skip
def test_bad_input(changes, message, loaded):
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(loaded("sd1"), PROMPT, size=SIZE, controls=[SAG(**changes)])
    assert str(raised.value) == message


@pytest.mark.parametrize("middle", ["UNetMidBlock2D", None])
def test_a_model_without_attention_in_the_middle(middle, loaded):
    unet = abstract(UNet, from_dict(UNetConfig, SD1 | {"mid_block_type": middle}))
    model = dc.replace(loaded("sd1"), unet=unet, name="tiny")
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(model, PROMPT, size=SIZE, controls=[SAG()])
    assert str(raised.value) == "SAG looks at the attention of the middle block, and tiny has none there."


@pytest.mark.parametrize("config", [*UNETS.values(), SDXL, *(unet for _, unet in KINDS.values())])
def test_what_it_looks_at_is_the_first_of_the_middle(config):
    paths = abstract(UNet, from_dict(UNetConfig, config)).attention_paths()
    middle = [path for path in paths if path.startswith("mid_block.")]
    assert middle[:1] == ([MIDDLE] if config.get("mid_block_type") != "UNetMidBlock2D" else [])
