"""Pix2Pix-Zero against the torch pipeline, against two runs one after the other, and what it costs."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import CFG, Pix2PixZero, SfumatoError, Window
from sfumato.controls import Control
from sfumato.controls.pix2pix_zero import AT_ONCE
from sfumato.models.unet import UNet
from sfumato.sample import AWAKE, _whole
from sfumato.samplers import DDIM
from sfumato.schedule import to_eps, to_x0
from sfumato.types import pytree

from drive import EXECUTIONS, counted, in_float64, prepared, widened
from oracle import assert_close, to_torch
from pipelines import small
from runs import NEGATIVE, STEPS, noise

PROMPT = "a photo of a cat"
SOURCE = ["a cat in the street", "a cat", "two cats that play"]
TARGET = ["a dog in the street", "a dog"]
PULL = 3000.0
"""An amount that moves the latents of tiny networks, whose maps are nearly flat."""
TALL = {"size": (16, 24), "latents": noise((1, 12, 8, 4))}


@pytest.fixture
def reference(pair):
    """reference(kind): both models, theirs in the pipeline of Pix2Pix-Zero. It changes its network, hence the end."""
    before = []

    def get(kind: str):
        both = pair(kind, small=kind == "sd1")  # the other's has attention on the way up, too
        unet = both.pipeline.unet
        before.append((unet, unet.attn_processors, [parameter.requires_grad for parameter in unet.parameters()]))
        parts = dict.fromkeys(("inverse_scheduler", "caption_generator", "caption_processor"))
        return both.through("StableDiffusionPix2PixZeroPipeline", **parts)

    yield get
    for unet, processors, gradients in before:
        unet.set_attn_processor(processors)
        for parameter, wanted in zip(unet.parameters(), gradients, strict=True):
            parameter.requires_grad_(wanted)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize(("kind", "amount"), [("sd1", 0.1), ("sd1", PULL), ("sd2", PULL)])
def test_as_the_reference(kind, amount, reference):
    both = reference(kind)
    want = both.theirs(
        PROMPT, source_embeds=both.pipeline.get_embeds(SOURCE), target_embeds=both.pipeline.get_embeds(TARGET),
        latents=to_torch(TALL["latents"]), width=16, height=24, cross_attention_guidance_amount=amount,
    )  # fmt: skip
    got = both.ours(PROMPT, controls=[CFG(5.0), Pix2PixZero(SOURCE, TARGET, amount)], **TALL)
    both.assert_same(got, want)
    free, plain = (
        both.ours(PROMPT, controls=[CFG(5.0), *more], **TALL) for more in ([Pix2PixZero(SOURCE, TARGET, 0.0)], ())
    )
    assert np.abs(free - plain).max() > 0.02 * np.ptp(plain), "the direction had no influence"
    if amount == PULL:
        assert np.abs(got - free).max() > 0.02 * np.ptp(free), "the maps had no influence"


# ---- The equations, on models that no reference has


@pytest.fixture(scope="module")
def models(loaded):
    return functools.cache(lambda kind: small(kind, loaded(kind)))


def edited(model, controls, **changes) -> np.ndarray:
    settings = {
        "prompt": PROMPT, "negative": NEGATIVE, "steps": STEPS, "size": (16, 16), "sampler": DDIM(),
        "output": "latents", "latents": noise(),
    } | changes  # fmt: skip
    return np.asarray(sfumato.generate(model, controls=controls, **settings))


def two_passes(model, scale: float | None, amount: float, window: Window) -> np.ndarray:
    """First the picture as it is, whose maps are kept, then the edit (arXiv:2302.03027, sections 3.2 and 3.3), in
    double precision, on the eight pictures of the laws. Without a `scale` there is no guidance."""
    single = prepared(model, (Pix2PixZero(SOURCE, TARGET, amount, window),))
    with jax.enable_x64(True):
        unet, steps, (control,), start, base = (jax.tree.map(widened, each) for each in single)
        layers = [path for path in unet.attention_paths() if path.endswith("attn2")]
        names = ["cond"] if scale is None else ["cond", "uncond"]

        @jax.jit
        def network(xs, t, contexts):
            conds = {name: dc.replace(base[name], context=contexts[name]) for name in names}
            return {name: unet(xs[name], t, conds[name], layers) for name in names}

        @jax.jit
        def slope(xs, t, contexts, kept):
            def loss(xs):
                found = network(xs, t, contexts)
                squares = [((found[n].taps[p] - kept[n][p]) ** 2).sum((2, 3)) for n in names for p in layers]
                heads = squares[0].shape[1]
                return sum(square.sum() / (heads * len(names)) for square in squares)

            return jax.grad(loss)(xs)

        def walk(contexts, kept: Mapping[int, dict] | None):
            x, maps = start, {}
            for i in range(STEPS):
                row = jax.tree.map(lambda column, i=i: column[i], steps)
                xs = dict.fromkeys(names, x)
                if kept is not None and bool(window.active(row)):
                    slopes = slope(xs, row.t, contexts, kept[i])
                    xs = {name: xs[name] - amount * slopes[name] for name in names}
                found = network(xs, row.t, contexts)
                maps[i] = {name: found[name].taps for name in names}
                out = {name: found[name].eps for name in names}
                guided = out["cond"] if scale is None else out["uncond"] + scale * (out["cond"] - out["uncond"])
                kind, last = model.schedule.prediction_type, xs[names[-1]]
                x0, eps = (to(guided, last, row.alpha, row.sigma, kind) for to in (to_x0, to_eps))
                x = row.alpha_next * x0 + row.sigma_next * eps
            return x, maps

        contexts = {name: base[name].context for name in names}
        _, kept = walk(contexts, None)
        return np.asarray(walk(contexts | {"cond": contexts["cond"] + control.direction}, kept)[0])


def in_step(model, scale: float | None, amount: float, window: Window) -> np.ndarray:
    """The same by the loop."""
    return in_float64(model, (*([] if scale is None else [CFG(scale)]), Pix2PixZero(SOURCE, TARGET, amount, window)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "scale", "window"),
    [("sdxl", 5.0, Window()), ("sdxl", 5.0, Window(0.25, 0.75)), ("sdxl", None, Window()), ("sd2", 5.0, Window(0.5))],
    ids=str,
)
def test_in_step_is_the_same_as_one_after_the_other(kind, scale, window, models):
    """Also for several pictures, none of which knows of the others."""
    amount = 30 * PULL if kind == "sdxl" else PULL
    got, want = (run(models(kind), scale, amount, window) for run in (in_step, two_passes))
    assert_close(got, want, 1e-6)  # the direction is in single precision
    free = in_step(models(kind), scale, 0.0, window)
    assert np.abs(got - free).max() > 1e-3 * np.ptp(free), "the maps had no influence"


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["dpm++ 2m", "euler a", "heun", "pndm"])
def test_a_run_that_follows_itself_goes_its_own_way(sampler, models):
    """Whatever the sampler remembers and draws: without a direction both runs are the same, and nothing pulls."""
    model = models("sd1")
    plain = edited(model, [CFG(5.0)], sampler=sampler)
    assert_close(edited(model, [CFG(5.0), Pix2PixZero(SOURCE, SOURCE, PULL)], sampler=sampler), plain, 1e-3)


@pytree
class Twin(Control):
    """An edit that says what the negative prompt says: nothing, as long as it is evaluated at the same latents."""

    def branches(self, base):
        return {"twin": dc.replace(base["uncond"])}

    def guide(self, env, preds, xs, step, state):
        return 100 * (preds["twin"].eps - preds["uncond"].eps), state


@pytest.mark.slow
def test_branches_of_other_controls_move_as_the_one_that_goes_on(models):
    controls = [CFG(5.0), Pix2PixZero(SOURCE, TARGET, PULL)]
    model = models("sd1")
    assert_close(edited(model, [*controls, Twin()]), edited(model, controls), 1e-4)


@pytest.mark.slow
def test_directions_are_means_of_many_sentences(models):
    """However many are encoded at once."""
    model, many = models("sd1"), [f"a cat number {number}" for number in range(AT_ONCE + 5)]

    def direction(sentences: Sequence[str]) -> np.ndarray:
        return np.asarray(prepared(model, (Pix2PixZero(sentences, "a dog"),))[2][0].direction)

    np.testing.assert_allclose(direction(many), np.mean([direction([each]) for each in many], axis=0), atol=1e-5)


# ---- What it costs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "amount", "further"),
    [(Window(0.0, 1.0), 0.1, 2 * STEPS), (Window(0.0, 0.5), 0.1, 4), (Window(0.5, 1.0), 0.1, STEPS + 2),
     (Window(1.0, 1.0), 0.1, 0), (Window(0.0, 1.0), 0.0, 0)],
)  # fmt: skip
def test_evaluations(window, amount, further, models):
    """The followed run takes one in every row until the window ends, and the pull one there and back inside of it."""
    model, runs = dc.replace(models("sd1"), unet=counted(models("sd1").unet)), []
    for controls in ([CFG(5.0)], [CFG(5.0), Pix2PixZero(SOURCE, TARGET, amount, window)]):
        EXECUTIONS[0] = 0
        edited(model, controls)
        jax.effects_barrier()
        runs.append(EXECUTIONS[0])
    assert runs == [STEPS, STEPS + further]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")  # for a lowered program jax fills our types with what is no array
def test_memory_holds_the_maps_of_one_step(models):
    """What the compiled loop needs besides its arguments does not grow with the number of steps."""
    model = models("sd1")
    unet, steps, controls, x, base = prepared(model, (CFG(5.0), Pix2PixZero(SOURCE, TARGET)))

    def memory(rows: int) -> int:
        many = jax.tree.map(lambda column: jnp.concatenate([column[:1]] * rows), steps)
        lowered = _whole.lower(unet, DDIM(), many, controls, x, base, model.schedule.prediction_type, None, AWAKE)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    paths = frozenset(path for path in unet.attention_paths() if path.endswith("attn2"))
    maps = jax.eval_shape(lambda x: unet(x, jnp.array(1.0), base["cond"], paths).taps, x)
    one_step = 2 * sum(each.size * 4 for each in maps.values())
    assert memory(2) > one_step
    assert memory(50) == memory(2)


# ---- What does not fit


class Blind(UNet):
    """A network that says of itself that it does not look at the text."""

    def attention_paths(self) -> tuple[str, ...]:
        return ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": []}, "Pix2PixZero's source must be a sentence or a list of them, with at least one, not []."),
        ({"target": 3}, "Pix2PixZero's target must be a sentence or a list of them, with at least one, not 3."),
        ({"target": ["a dog", None]}, "Pix2PixZero's target must be a sentence or a list"),
        ({"amount": -1.0}, "Pix2PixZero's amount must lie in [0, inf], not be -1."),
        ({"amount": float("nan")}, "Pix2PixZero's amount must be a finite number, not nan."),
        ({"window": Window(0.5, 0.2)}, "The window of Pix2PixZero starts at 0.5 and stops before that, at 0.2."),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_one_sentence(changes, message, loaded):
    control = Pix2PixZero(**{"source": SOURCE, "target": TARGET} | changes)
    with pytest.raises(SfumatoError) as raised:
        sfumato.generate(loaded("sd1"), PROMPT, controls=[CFG(), control], size=(16, 16))
    assert str(raised.value).startswith(message)


def test_not_with_instructions(loaded):
    from PIL import Image

    both = [Pix2PixZero(SOURCE, TARGET), sfumato.InstructPix2Pix(Image.new("RGB", (16, 16)))]
    for controls in (both, both[::-1]):
        with pytest.raises(SfumatoError, match=r"Pix2PixZero and InstructPix2Pix cannot run together: .*\."):
            sfumato.generate(loaded("instruct-pix2pix"), PROMPT, controls=controls, size=(16, 16))


def test_not_without_attention_to_the_text(loaded):
    model = loaded("sd1")
    blind = jax.tree.map(lambda a: a, model.unet)
    object.__setattr__(blind, "__class__", Blind)
    with pytest.raises(SfumatoError, match=r"Pix2PixZero follows attention to the text, and this network has no such"):
        sfumato.generate(dc.replace(model, unet=blind), PROMPT, controls=[Pix2PixZero(SOURCE, TARGET)], size=(16, 16))
