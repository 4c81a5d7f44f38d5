"""Attend-and-Excite against the torch pipeline, against the authors' loop in float64, and beside other controls."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato import CFG, AttendAndExcite, ControlNet, Inpaint, SfumatoError, Window, generate
from sfumato.controls.attend_and_excite import DEVIATION, RADIUS, Excitement, layers_near
from sfumato.controls.base import Env, Request
from sfumato.controls.blur import blurred
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.samplers.base import make_table
from sfumato.types import Conditioning, Prediction

from drive import EXECUTIONS, counted
from oracle import to_torch
from pipelines import small, small_net
from published import UNETS
from runs import NEGATIVE, SIZE, mask, noise, picture

ORACLE = "StableDiffusionAttendAndExcitePipeline"
PROMPTS = ["a red fox in the snow", "a blue bird"]
WORDS, INDICES = [["red", "snow"], ["bird"]], [[2, 6], [3]]
SCALE = 2000.0
"""A random network needs great steps for little attention."""


# ---- The torch pipeline


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize(("steps", "thresholds"), [
    (4, {0: 0.0, 2: 0.0}), (3, {0: 0.015, 1: 0.016}), (3, {0: 0.02, 1: 0.03}),
], ids=["no more than once", "one picture more often", "as often as it may"])  # fmt: skip
def test_as_the_reference(steps, thresholds, pair):
    """Two pictures that are not square: the reference reads their maps rightly if it is told height and width as width
    and height."""
    both, start = pair("sd1", small=True).through(ORACLE), noise((2, 8, 12, 4))
    settings = {"latents": start, "size": (24, 16)}
    got = both.ours(PROMPTS, controls=[CFG(5.0), AttendAndExcite(WORDS, steps, thresholds, SCALE)], **settings)
    want = both.theirs(
        PROMPTS, token_indices=INDICES, max_iter_to_alter=steps, thresholds=thresholds, scale_factor=SCALE,
        attn_res=(8, 12), latents=to_torch(start), height=16, width=24, negative_prompt=[NEGATIVE] * 2,
    )  # fmt: skip
    both.assert_same(got, want)
    assert np.abs(got - both.ours(PROMPTS, **settings)).max() > 0.05, "it did nothing"


@pytest.mark.parity
@pytest.mark.slow
def test_at_a_level_of_odd_size(pair):
    """Thresholds of rows after `steps` hold in the reference, and here they do not. It looks at the size of latents
    and not at that of the picture, which it would refuse."""
    both, start = pair("sd1").through(ORACLE), noise((1, 9, 11, 4))
    control = AttendAndExcite(["fox"], 2, {0: 0.02, 3: 0.9}, SCALE)
    got = both.ours(controls=[CFG(5.0), control], latents=start, size=(22, 18))
    want = both.theirs(
        token_indices=[3], max_iter_to_alter=2, thresholds={0: 0.02}, scale_factor=SCALE, attn_res=(5, 6),
        latents=to_torch(start), height=16, width=16,
    )  # fmt: skip
    both.assert_same(got, want)


@pytest.mark.parity
@pytest.mark.slow
def test_velocity_and_the_prompts_own_tokens(pair):
    """The reference takes the softmax over a whole chunk, and we over the prompt: they agree where it fills the chunk.
    It is given the indices of both foxes."""
    both, prompt = pair("sd2", small=True).through(ORACLE), "a red fox" + " a" * 71 + " fox"
    assert len(both.model.tokenizers["tokenizer"].encode(prompt)) == 75
    got = both.ours(prompt, controls=[CFG(5.0), AttendAndExcite(["fox"], 3, {1: 0.02}, SCALE)])
    want = both.theirs(
        prompt, token_indices=[3, 75], max_iter_to_alter=3, thresholds={1: 0.02}, scale_factor=SCALE,
        attn_res=(8, 8), latents=to_torch(noise()), height=16, width=16,
    )  # fmt: skip
    both.assert_same(got, want)
    assert np.abs(got - both.ours(prompt)).max() > 0.05, "it did nothing"


# ---- The authors' loop, in float64: maps that depend on the latents stand for the network

LAYERS, HEADS, HEIGHT, WIDTH, LENGTH, ROWS = ("a", "b"), 2, 5, 7, 9, 4
TEXT, PLACES = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4]], [[2, 5], [3]]
EVALUATIONS = [0]


def maps_of(x: Any, softmax: Callable[..., Any], array: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """Attention maps [B N Q L] of latents [B H W 4], in jax or in torch."""
    rng = np.random.default_rng(0)
    keys = {name: array(rng.standard_normal((4, HEADS * LENGTH)) * 0.4) for name in LAYERS}
    logits = {name: (x.reshape(len(x), HEIGHT * WIDTH, 4) @ key) for name, key in keys.items()}
    shape = (len(x), HEIGHT * WIDTH, HEADS, LENGTH)
    return {name: softmax(each.reshape(shape).swapaxes(1, 2)) for name, each in logits.items()}


def env() -> Env:
    """With a network that counts how often it runs."""

    def count() -> None:
        EVALUATIONS[0] += 1

    def evaluate(xs: Mapping[str, Any], taps: Any = ()) -> dict[str, Prediction]:
        jax.debug.callback(count)
        assert tuple(taps) == LAYERS
        assert list(xs) == ["cond"]
        return {"cond": Prediction(xs["cond"], maps_of(xs["cond"], jax.nn.softmax, jnp.asarray))}

    def never(*_: Any) -> Any:
        raise AssertionError("it has no use for that")

    return Env(**{field.name: never for field in dc.fields(Env)} | {"evaluate": evaluate})


def excitement(steps: int, thresholds: Mapping[int, float], most: int, places: Any = PLACES) -> Excitement:
    words, text = np.zeros((2, 2, LENGTH), bool)
    for i in range(2):
        words[i, places[i]] = text[i, TEXT[i]] = True
    rows, values = np.array(list(thresholds), np.int32), np.array(list(thresholds.values()), np.float64)
    return Excitement(
        jnp.asarray(words), jnp.asarray(text), jnp.asarray(rows), jnp.asarray(values), jnp.int32(steps),
        jnp.float64(8.0), jnp.int32(most), LAYERS, 0,
    )  # fmt: skip


@jax.jit
def steered(control: Excitement, x: Any, rows: Any) -> Any:
    """The latents after each row, of both branches, where nothing but the control moves them."""

    def row(carry: Any, step: Any) -> tuple[Any, Any]:
        xs, state = control.steer(env(), carry[0], step, carry[1])
        return (xs, state), xs

    return jax.lax.scan(row, ({"cond": x, "uncond": x + 1}, control.init(x, ())), rows)[1]


def ours(control: Excitement, x: np.ndarray) -> tuple[dict[str, np.ndarray], int]:
    """The latents after each row, and the number of evaluations."""
    EVALUATIONS[0] = 0
    got = steered(control, jnp.asarray(x), jax.tree.map(jnp.asarray, make_table(*np.zeros((5, ROWS))).steps))
    got = jax.tree.map(np.asarray, got)
    jax.effects_barrier()
    return got, EVALUATIONS[0]


def authors(
    x: np.ndarray, text: list[int], places: list[int], steps: int, thresholds: Mapping[int, float], most: int
) -> tuple[list[np.ndarray], list[int]]:
    """One picture [H W 4], as their code goes about it: the latents after each row, and how often it moved in each."""
    import torch

    offsets = torch.arange(-1, 2, dtype=torch.float64)
    kernel = torch.exp(-(offsets[:, None] ** 2 + offsets**2))
    kernel = (kernel / kernel.sum())[None, None]

    def moved(latents: Any, alpha: float) -> tuple[float, Any]:
        """The loss here, and a step along its gradient."""
        latents = latents.clone().requires_grad_()
        maps = maps_of(latents[None], lambda logits: logits.softmax(-1), torch.from_numpy)
        mean = torch.cat([each[0] for each in maps.values()]).mean(0).reshape(HEIGHT, WIDTH, LENGTH)
        shares = (100 * mean[..., text]).softmax(-1)
        images = [shares[None, None, ..., text.index(place)] for place in places]
        around = [torch.nn.functional.pad(image, (1, 1, 1, 1), mode="reflect") for image in images]
        loss = max(1 - torch.nn.functional.conv2d(image, kernel).max() for image in around)
        (slope,) = torch.autograd.grad(loss, latents)
        return loss.item(), (latents - alpha * slope).detach()

    latents, results, counts = torch.from_numpy(x), [], []
    for row, alpha in enumerate(8.0 * np.sqrt(np.linspace(1, 0.5, ROWS))):
        count = 0
        if row < steps:
            loss, goal = moved(latents, alpha)[0], 1 - thresholds.get(row, -np.inf)
            while loss > goal and count < most:
                loss, latents = moved(latents, alpha)
                count += 1
            latents, count = moved(latents, alpha)[1], count + 1
        results.append(latents.numpy())
        counts.append(count)
    return results, counts


@pytest.mark.parametrize(("steps", "thresholds", "most"), [
    (4, {}, 20), (2, {0: 0.0, 1: 0.0}, 20), (4, {0: 0.6, 2: 0.9}, 20), (3, {1: 0.8, 3: 0.9}, 20),
    (4, {0: 0.9, 1: 0.95}, 20), (4, {0: 0.9, 1: 0.95}, 3), (4, {0: 1.0, 1: 1.0}, 0),
])  # fmt: skip
def test_as_the_authors_go_about_it(steps, thresholds, most):
    with jax.enable_x64(True):
        x = np.random.default_rng(1).standard_normal((2, HEIGHT, WIDTH, 4))
        got, evaluations = ours(excitement(steps, thresholds, most), x)
        counts = []
        for i in range(2):
            want, count = authors(x[i], TEXT[i], PLACES[i], steps, thresholds, most)
            np.testing.assert_allclose(got["cond"][:, i], want, atol=1e-10)
            counts.append(count)
        np.testing.assert_allclose(got["uncond"] - got["cond"], 1, atol=1e-12)
        assert evaluations == np.max(counts, axis=0).sum()


def test_it_costs_nothing_where_there_is_nothing_to_do():
    x = np.random.default_rng(1).standard_normal((2, HEIGHT, WIDTH, 4))
    with jax.enable_x64(True):
        got, evaluations = ours(excitement(0, {0: 0.9}, 20), x)
        np.testing.assert_array_equal(got["cond"], np.broadcast_to(x, got["cond"].shape))
        assert evaluations == 0


def test_a_picture_without_words_stays():
    """Also one whose prompt has no words at all."""
    x = np.random.default_rng(1).standard_normal((2, HEIGHT, WIDTH, 4))
    with jax.enable_x64(True):
        control = excitement(4, {0: 0.9}, 20, [[2, 5], []])
        control = dc.replace(control, text=control.text.at[1].set(False))
        got, _ = ours(control, x)
        np.testing.assert_array_equal(got["cond"][:, 1], np.broadcast_to(x[1], (ROWS, HEIGHT, WIDTH, 4)))
        assert np.abs(got["cond"][:, 0] - x[0]).max() > 0.01


@pytest.mark.parametrize("size", [(5, 7), (1, 4), (2, 1), (1, 1)])
def test_the_gaussian_keeps_what_is_even(size):
    np.testing.assert_allclose(blurred(jnp.full((1, *size, 3), 0.7), RADIUS, DEVIATION), 0.7, rtol=1e-6)


# ---- Words, layers and what does not fit


@pytest.fixture
def request_for(loaded):
    """request_for(kind, prompts): what a control sees of a run, with text features of `chunks`."""

    def get(kind: str, prompts: Sequence[str] = PROMPTS, chunks: int = 1, **changes: Any) -> Request:
        def encode(texts: Sequence[str]) -> Conditioning:
            return Conditioning(jnp.zeros((len(texts), 77 * chunks, 24)))

        blank = jnp.zeros((len(prompts), 8, 8, 4))
        given = Request(loaded(kind), prompts, [""] * len(prompts), SIZE, blank, True, encode, lambda pixels: blank)
        return dc.replace(given, **changes)

    return get


def where(mask: Any) -> list[list[int]]:
    return [np.flatnonzero(row).tolist() for row in mask]


def test_words_of_all_and_of_each(request_for):
    both = request_for("sd1", ["a cat and a frog", "a frog and two cat"])
    assert where(AttendAndExcite(["cat", "frog"]).prepare(both).words) == [[2, 5], [2, 5]]
    assert where(AttendAndExcite([["cat"], ["frog"]]).prepare(both).words) == [[2], [2]]
    assert where(AttendAndExcite([["cat"], []]).prepare(both).words) == [[2], []]
    assert where(AttendAndExcite([["cat", "frog"]]).prepare(both).words) == [[2, 5], [2, 5]]


def test_all_tokens_of_a_word_wherever_it_occurs(request_for):
    one = request_for("sd1", ["a (fox:1.2) BREAK a supercalifragilistic fox"], 3)
    tokens = len(one.model.tokenizers["tokenizer"].encode("supercalifragilistic"))
    assert tokens > 1
    words = AttendAndExcite(["fox", "supercalifragilistic"]).prepare(one).words
    assert where(words) == [[2, *range(77 + 2, 77 + 2 + tokens + 1)]]
    literal = request_for("sd1", ["a (fox:1.2)"], weights=False)
    assert where(AttendAndExcite(["fox"]).prepare(literal).words) == [[3]]


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_tokens_compete(kind, request_for):
    given = request_for(kind, ["a fox BREAK a cat", "a fox"], 2)
    whole = [at for at in range(154) if at % 77 not in (0, 76)]
    want = [whole, whole] if kind == "sd1" else [[1, 2, 78, 79], [1, 2]]
    assert where(AttendAndExcite(["fox"]).prepare(given).text) == want


@pytest.mark.parametrize(("kind", "level", "count"), [
    ("sd1", 2, 5), ("sd2", 2, 5), ("sdxl", 2, 60), ("sdxl-refiner", 2, 20),
])  # fmt: skip
def test_the_layers_at_a_quarter_of_the_size(kind, level, count):
    found, layers = layers_near(abstract(UNet, from_dict(UNetConfig, UNETS[kind])), 2)
    assert (found, len(layers)) == (level, count)
    assert all(path.endswith(".attn2") for path in layers)


BAD = {
    "an unknown word": ({"words": ["fox", "cat"]}, "'cat' is not among the words of the prompt, which are: a, red"),
    "a word of the other prompt": ({"words": [["bird"], ["fox"]]}, "'bird' is not among the words of the prompt"),
    "one word, no list": ({"words": "fox"}, "AttendAndExcite takes a list of words, such as ['cat', 'frog']"),
    "no words": ({"words": []}, "AttendAndExcite takes a list of words"),
    "a number": ({"words": ["fox", 3]}, "AttendAndExcite takes a list of words"),
    "a number in one of the lists": ({"words": [["fox"], [3]]}, "AttendAndExcite takes a list of words"),
    "too many lists": ({"words": [["fox"]] * 3}, "has 3 lists of words for 2 pictures; give one, or 2."),
    "half steps": ({"steps": 2.5}, "AttendAndExcite's steps must be a whole number from 0 on, not 2.5."),
    "negative steps": ({"steps": -1}, "AttendAndExcite's steps must be a whole number from 0 on, not -1."),
    "a number of moves that is none": ({"max_iterations": None}, "max_iterations must be a whole number from 0 on"),
    "scale NaN": ({"scale": float("nan")}, "AttendAndExcite's scale must be a finite number, not nan."),
    "one threshold": ({"thresholds": 0.5}, "thresholds are {row: share}, such as {10: 0.5}, not a float."),
    "a row that is none": ({"thresholds": {"0": 0.5}}, "A row of AttendAndExcite's thresholds must be a whole number"),
    "a threshold above 1": ({"thresholds": {3: 5}}, "threshold of row 3 must lie in [0, 1], not be 5."),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("changes", "sentence"), BAD.values(), ids=BAD)
def test_one_sentence(changes, sentence, request_for):
    given = request_for("sd1", ["a red fox", "a red fox and a bird"])
    with pytest.raises(SfumatoError) as caught:
        AttendAndExcite(**{"words": ["fox"]} | changes).prepare(given)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- In the loop


@pytest.mark.slow
def test_it_costs_its_moves_and_nothing_else(loaded):
    """Every execution of the network is counted, those for gradients as well."""
    model = small("sd1", loaded("sd1"))
    model = dc.replace(model, unet=counted(model.unet))

    def executions(*controls: Any, **changes: Any) -> int:
        EXECUTIONS[0] = 0
        settings = {"controls": [CFG(5.0), *controls], "steps": 4, "size": SIZE, "output": "latents"} | changes
        np.asarray(generate(model, PROMPTS, **settings))
        jax.effects_barrier()
        return EXECUTIONS[0]

    assert executions() == 4
    assert executions(AttendAndExcite(WORDS, 0, {0: 0.9})) == 4
    assert executions(AttendAndExcite(WORDS, 3, {3: 0.9})) == 4 + 3
    assert executions(AttendAndExcite(WORDS, 3, {1: 0.9}, max_iterations=5)) == 4 + 3 + 5
    drawn = {"image": picture(4), "strength": 0.5}
    assert executions(AttendAndExcite(WORDS, 1, {0: 0.9}, max_iterations=5), **drawn) == 2 + 1 + 5


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sampler"), [("sd1-inpaint", "heun"), ("sdxl", "euler")])
def test_with_other_controls_from_a_picture(kind, sampler, loaded):
    """Also through a ControlNet that is switched off meanwhile, and extra input channels."""
    net = small_net(kind.removesuffix("-inpaint"))
    others = [CFG(5.0), ControlNet(net, picture(3), window=Window(0.5, 1.0)), Inpaint(picture(), mask())]

    def made(*controls: Any) -> np.ndarray:
        latents = generate(
            small(kind, loaded(kind)), PROMPTS, controls=[*others, *controls], sampler=sampler, steps=3, size=SIZE,
            image=picture(4), strength=0.7, output="latents",
        )  # fmt: skip
        return np.asarray(latents)

    got = made(AttendAndExcite(WORDS, 2, {0: 0.02}, SCALE))
    assert np.isfinite(got).all()
    assert np.abs(got - made()).max() > 0.01, "it did nothing"
