"""Prompts: the notation, chunks, and the features against the torch pipelines."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sfumato
from sfumato.errors import SfumatoError
from sfumato.models.clip import PROJECTED, ClipTextConfig, ClipTextEncoder
from sfumato.text import prompt
from sfumato.text.prompt import encode, encode_prompt, parse, tokenize, tokenize_prompt, weigh
from sfumato.text.tokenizer import TruncationWarning, clip_tokenizer

from oracle import assert_close, from_torch
from pipelines import torch_pipeline

TOKENIZER = clip_tokenizer()
FOX, BOS, EOS = 3240, 49406, 49407
LESS = 1 / 1.1


@pytest.mark.parametrize(("text", "parts"), [
    ("", []),
    ("a fox", [("a fox", 1)]),
    ("(fox)", [("fox", 1.1)]),
    ("[fox]", [("fox", LESS)]),
    ("a (red:1.3) fox", [("a ", 1), ("red", 1.3), (" fox", 1)]),
    ("(a: 1.5 )(b:.5)(c:+2)(d:-1)(e:0)", [("a", 1.5), ("b", 0.5), ("c", 2), ("d", -1), ("e", 0)]),
    ("((fox))", [("fox", 1.1 * 1.1)]),
    ("[[fox]]", [("fox", LESS * LESS)]),
    ("([fox])", [("fox", 1)]),
    ("(a (b:2) [c]:3)", [("a ", 3), ("b", 6), (" ", 3), ("c", 3 * LESS)]),
    ("(a)(b)", [("ab", 1.1)]),
    ("a(b:1.0)c", [("abc", 1)]),
    ("()[](:2)", []),
    # escapes
    (r"\(fox\)", [("(fox)", 1)]),
    (r"\[fox\]", [("[fox]", 1)]),
    (r"(smile \(large\):1.2)", [("smile (large)", 1.2)]),
    (r"\\(fox)", [("\\", 1), ("fox", 1.1)]),
    (r"\\\(fox\\\)", [(r"\(fox\)", 1)]),
    (r"a\b\n", [(r"a\b\n", 1)]),
    # no number, and a number where none belongs
    ("(a:b)", [("a:b", 1.1)]),
    ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
    ("(a:1e9)", [("a:1e9", 1.1)]),
    ("(a:nan)", [("a:nan", 1.1)]),
    ("[a:0.5]", [("a:0.5", LESS)]),
    ("16:9", [("16:9", 1)]),
    # without a partner
    ("(fox", [("(fox", 1)]),
    ("fox)", [("fox)", 1)]),
    ("fox:1.2)", [("fox:1.2)", 1)]),
    ("[fox)", [("[fox)", 1)]),
    ("((fox)", [("(", 1), ("fox", 1.1)]),
    ("(fox))", [("fox", 1.1), (")", 1)]),
    ("(a [b) c]", [("a [b", 1.1), (" c]", 1)]),
    (":-) [", [(":-) [", 1)]),
])  # fmt: skip
def test_the_notation(text, parts):
    assert parse(text) == [(words, pytest.approx(weight)) for words, weight in parts]


@pytest.mark.parametrize("text", ["(" * 20000 + "a" + ")" * 20000, "(" * 20000 + "]" * 20000, "([" * 20000])
def test_many_brackets_take_no_long_time(text):
    assert len(parse(text)) == 1


@pytest.mark.parametrize("text", ["", "a fox", "it's a fox, 8k!", "naïve café 🐱", "x<|endoftext|>y"])
def test_a_plain_prompt_is_what_the_tokenizer_makes(text):
    tokens = tokenize(TOKENIZER, [text, "another one"])
    np.testing.assert_array_equal(tokens.ids[:, 0], TOKENIZER([text, "another one"]))
    np.testing.assert_array_equal(tokens.weights, 1)
    assert tokens.ids.shape == (2, 1, 77)


def test_every_token_of_a_part_has_its_weight():
    tokens = tokenize(TOKENIZER, ["a (red photographer:1.5) fox"])
    plain = TOKENIZER(["a red photographer fox"])
    np.testing.assert_array_equal(tokens.ids[:, 0], plain)
    expected = np.ones(77)
    expected[[2, 3]] = 1.5
    assert TOKENIZER.words("a red photographer fox")[2] == ("photographer", (3,))
    np.testing.assert_array_equal(tokens.weights[0, 0], expected)


def test_without_weights_text_is_read_literally():
    text = r"a (red:1.5) \(fox\) [x]"
    tokens = tokenize(TOKENIZER, [text], weights=False)
    np.testing.assert_array_equal(tokens.ids[:, 0], TOKENIZER([text]))
    np.testing.assert_array_equal(tokens.weights, 1)


@pytest.mark.parametrize(("count", "chunks"), [(0, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_a_long_prompt_fills_chunks_of_75(count, chunks):
    tokens = tokenize(TOKENIZER, ["fox " * count, "a"])
    assert tokens.ids.shape == (2, chunks, 77)
    for chunk in range(chunks):
        inside = min(max(count - 75 * chunk, 0), 75)
        np.testing.assert_array_equal(tokens.ids[0, chunk], [BOS, *[FOX] * inside, *[EOS] * (76 - inside)])
    np.testing.assert_array_equal(tokens.ids[1, 1:], np.broadcast_to(TOKENIZER([""]), (chunks - 1, 77)))


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_empty_chunks_are_empty_prompts_of_the_same_tokenizer(pad):
    tokenizer = clip_tokenizer(pad)
    tokens = tokenize(tokenizer, ["fox"], chunks=3)
    np.testing.assert_array_equal(tokens.ids[0], tokenizer(["fox", "", ""]))


@pytest.mark.parametrize(("text", "chunks"), [
    ("a fox BREAK a forest", ["a fox", "a forest"]),
    ("a BREAK b BREAK c", ["a", "b", "c"]),
    ("(a BREAK b:1.2)", ["a", "b"]),
    ("BREAK a", ["a"]),
    ("a BREAK", ["a"]),
    ("a BREAK BREAK b", ["a", "b"]),
    ("BREAK", [""]),
    ("a BREAKFAST, a break", ["a BREAKFAST, a break"]),
])  # fmt: skip
def test_the_word_break_starts_a_chunk(text, chunks):
    np.testing.assert_array_equal(tokenize(TOKENIZER, [text]).ids[0], TOKENIZER(chunks))


PLACED = TOKENIZER.place("<cat>", 4)
CAT = [49408, 49409, 49410, 49411]


def test_all_tokens_of_a_placeholder_have_its_weight():
    tokens = tokenize(PLACED, ["a (<cat>:1.2), [<cat>]"])
    assert tokens.ids[0, 0, :12].tolist() == [BOS, 320, *CAT, 267, *CAT, EOS]
    expected = np.ones(77)
    expected[2:6], expected[7:11] = 1.2, LESS
    np.testing.assert_allclose(tokens.weights[0, 0], expected)


@pytest.mark.parametrize("before", range(69, 77))
@pytest.mark.parametrize("weight", ["{}", "({}:1.3)"])
def test_a_placeholder_is_not_divided_between_chunks(before, weight):
    tokens = tokenize(PLACED, ["fox " * before + weight.format("<cat>") + " fox"])
    first = before if 71 < before < 76 else min(before + 5, 75)
    second = before + 5 - first
    ids = [token for chunk in tokens.ids[0] for token in chunk if token not in (BOS, EOS)]
    assert ids == [FOX] * before + CAT + [FOX]
    assert (tokens.ids[0] == FOX).any(axis=-1).all()
    assert [sum(token not in (BOS, EOS) for token in chunk) for chunk in tokens.ids[0]] == [first, second][
        : 1 + (second > 0)
    ]
    assert len({*np.nonzero(np.isin(tokens.ids[0], CAT))[0].tolist()}) == 1
    assert (tokens.ids[0, :, 0] == BOS).all()
    np.testing.assert_array_equal((tokens.weights[0] != 1), np.isin(tokens.ids[0], CAT) & (weight != "{}"))


def test_a_placeholder_that_is_cut_off():
    with pytest.warns(TruncationWarning, match="79 tokens and only 75 are read; cut off was: <cat> fox"):
        tokens = tokenize(PLACED, ["fox " * 74 + "<cat> fox"], long=False)
    assert tokens.ids[0, 0, 74:].tolist() == [FOX, CAT[0], EOS]


@pytest.mark.parametrize("weights", [True, False])
def test_a_prompt_that_may_not_be_long_is_cut_off_with_a_warning(weights):
    text = "fox " * 75 + "and BREAK bear"
    with pytest.warns(TruncationWarning, match="78 tokens and only 75 are read; cut off was: and BREAK bear"):
        tokens = tokenize(TOKENIZER, [text], long=False, weights=weights)
    with pytest.warns(TruncationWarning):
        np.testing.assert_array_equal(tokens.ids[:, 0], TOKENIZER([text]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenize(TOKENIZER, ["a (fox)"], long=False)


@pytest.mark.parametrize(("texts", "message"), [
    ("a fox", "takes a list of prompts"),
    ([], "takes a list of prompts with at least one"),
    (["(fox:" + "9" * 50 + ")"], "A weight in the prompt .* is too large"),
    (["(fox:" + "9" * 500 + ")"], "is too large"),
])  # fmt: skip
def test_what_is_no_prompt_is_refused(texts, message):
    with pytest.raises(SfumatoError, match=message):
        tokenize(TOKENIZER, texts)


# Features of a small encoder

TINY = ClipTextConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=8,
    architectures=(PROJECTED,),
)  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    encoder = ClipTextEncoder(TINY, rngs=nnx.Rngs(0))
    norm = encoder.text_model.final_layer_norm
    norm.bias[...] = jnp.linspace(-0.1, 0.4, 16)  # a trained one has a mean
    return encoder


run = jax.jit(encode, static_argnums=(3, 4))
plain = jax.jit(lambda encoder, ids, skip, normalize: encoder(ids, skip, normalize), static_argnums=(2, 3))


def features(encoder, texts, skip=0, normalize=True):
    tokens = tokenize(TOKENIZER, texts)
    return run(encoder, jnp.asarray(tokens.ids), jnp.asarray(tokens.weights), skip, normalize)


@pytest.mark.parametrize(("skip", "normalize"), [(0, True), (1, False)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_plain_weights_change_nothing_bit_for_bit(encoder, skip, normalize, dtype):
    encoder = jax.tree.map(lambda a: a.astype(dtype), encoder)
    texts = ["a fox in the snow", "([a bear]), (and:1.0) more", ""]
    got = features(encoder, texts, skip, normalize)
    want = plain(encoder, jnp.asarray(tokenize(TOKENIZER, texts).ids[:, 0]), skip, normalize)
    np.testing.assert_array_equal(got.hidden, want.hidden)
    np.testing.assert_array_equal(got.pooled, want.pooled)
    assert got.hidden.dtype == dtype


def test_plain_prompts_beside_weighted_ones_are_not_touched(encoder):
    with_weights, without = features(encoder, ["a fox", "a (bear)"]), features(encoder, ["a fox", "a bear"])
    np.testing.assert_array_equal(with_weights.hidden[0], without.hidden[0])
    assert np.abs(with_weights.hidden[1] - without.hidden[1]).max() > 1e-3
    np.testing.assert_array_equal(with_weights.pooled, without.pooled)


def test_chunks_are_encoded_alone_and_put_one_after_another(encoder):
    both = features(encoder, ["a fox (in:1.4) snow BREAK [a bear]"])
    first, second = (features(encoder, [text]) for text in ("a fox (in:1.4) snow", "[a bear]"))
    assert both.hidden.shape == (1, 154, 16)
    assert_close(both.hidden, np.concatenate([first.hidden, second.hidden], axis=1), tol=1e-5)
    assert_close(both.pooled, first.pooled, tol=1e-5)


def test_the_formula_of_the_weights(encoder):
    hidden = np.asarray(features(encoder, ["a red fox"]).hidden)[0]
    weights = np.ones((77, 1))
    weights[2], weights[3] = 1.5, 1.5 * 1.1
    expected = weights * hidden
    expected *= hidden.mean() / expected.mean()
    got = np.asarray(features(encoder, ["a (red (fox):1.5)"]).hidden)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.mean(), hidden.mean(), atol=1e-6)


@pytest.mark.parametrize("shift", [0.0, 1e-7])
def test_without_a_mean_nothing_is_restored(shift):
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 3)), jnp.float32)
    np.testing.assert_array_equal(weigh(hidden, jnp.zeros((1, 4))), 0)
    balanced = jnp.concatenate([hidden, -hidden], axis=1) + shift
    weights = jnp.linspace(0.5, 2, 8)[None]
    np.testing.assert_allclose(weigh(balanced, weights), balanced * weights[..., None], rtol=1e-6)


# Whole models against the torch pipelines

PROMPTS = ["a photograph of an astronaut riding a horse", "two foxes!"]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl", "sdxl-refiner"])
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pipeline = torch_pipeline(request.param, folder)
    pipeline.save_pretrained(folder / "model")
    return sfumato.load(folder / "model", dtype="float32"), pipeline


def reference(pipeline, prompts, clip_skip, prompt_2=None):
    """The context and the pooled features of the torch pipeline."""
    import torch

    options = {"device": "cpu", "num_images_per_prompt": 1, "clip_skip": clip_skip}
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        if hasattr(pipeline, "text_encoder_2"):
            context, _, pooled, _ = pipeline.encode_prompt(
                prompts, prompt_2, do_classifier_free_guidance=False, **options
            )
            return from_torch(context), from_torch(pooled)
        if clip_skip and not hasattr(pipeline.text_encoder, "text_model"):
            # The pipeline looks for the final norm where transformers had it before version 5.
            patch.setattr(type(pipeline.text_encoder), "text_model", property(lambda self: self), raising=False)
        return from_torch(pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, **options)[0]), None


@pytest.mark.parity
@pytest.mark.parametrize("clip_skip", [0, 1])
def test_the_features_are_those_of_the_torch_pipeline(pair, clip_skip):
    model, pipeline = pair
    context, pooled = reference(pipeline, PROMPTS, clip_skip or None)
    got = encode_prompt(model, tokenize_prompt(model, PROMPTS), clip_skip=clip_skip)
    assert_close(got.hidden, context)
    if pooled is not None:
        assert_close(got.pooled, pooled)


@pytest.mark.parity
def test_the_second_encoder_may_read_a_prompt_of_its_own(pair):
    model, pipeline = pair
    second = ["a watercolour", "fox " * 80]
    if len(model.text_encoders) < 2:
        with pytest.raises(SfumatoError, match="has one text encoder, so a second prompt has no reader"):
            tokenize_prompt(model, PROMPTS, second)
        return
    short = [second[0], "an etching"]
    context, pooled = reference(pipeline, PROMPTS, None, short)
    got = encode_prompt(model, tokenize_prompt(model, PROMPTS, short))
    assert_close(got.hidden, context)
    assert_close(got.pooled, pooled)
    tokens = tokenize_prompt(model, PROMPTS, second)
    assert {each.ids.shape for each in tokens.values()} == {(2, 2, 77)}
    assert encode_prompt(model, tokens).hidden.shape == (2, 154, 32)
    with pytest.raises(SfumatoError, match="There are 2 prompts and 1 for the second text encoder"):
        tokenize_prompt(model, PROMPTS, ["one"])


@pytest.mark.parametrize("clip_skip", [-1, 4])
def test_more_layers_than_there_are_cannot_be_skipped(pair, clip_skip):
    model, _ = pair
    with pytest.raises(SfumatoError, match=f"clip_skip={clip_skip} does not fit the text encoder, which allows 0 to"):
        encode_prompt(model, tokenize_prompt(model, PROMPTS), clip_skip=clip_skip)


def test_other_words_and_weights_compile_nothing(pair):
    model, _ = pair
    encode_prompt(model, tokenize_prompt(model, PROMPTS))
    before = prompt._encode_all.ways(True).plain._cache_size()
    encode_prompt(model, tokenize_prompt(model, ["a (bear:1.3)", "[nothing]"]))
    assert prompt._encode_all.ways(True).plain._cache_size() == before
