"""What is remembered of texts, and what is not."""

from __future__ import annotations

import dataclasses as dc
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.text import memory, prompt
from sfumato.text.memory import remembered
from sfumato.text.prompt import encode_prompt, tokenize_prompt


@pytest.fixture
def made(monkeypatch):
    """The shapes of what the text encoders were given."""
    own, seen = prompt._encode_all, []
    monkeypatch.setattr(memory, "_entries", type(memory._entries)())

    def counted(encoders, tokens, skip, normalize):
        seen.append(tokens[0].ids.shape)
        return own(encoders, tokens, skip, normalize)

    monkeypatch.setattr(prompt, "_encode_all", counted)
    return seen


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_prompt_is_read_once(models, made, kind):
    """Others are read, and so is the same one in another way or by another model."""
    model = models(kind)
    changed = dict(model.text_encoders)
    changed["text_encoder"] = jax.tree.map(lambda a: a * 1.5, changed["text_encoder"])
    others = {
        "a cat": (model, ["a cat"], 0), "a dog": (model, ["a dog"], 0), "two": (model, ["a cat", "a dog"], 0),
        "a part": (model, ["a (cat:1.5)"], 0), "fewer layers": (model, ["a cat"], 1),
        "another model": (dc.replace(model, text_encoders=changed), ["a cat"], 0),
    }  # fmt: skip

    def read():
        return {
            name: encode_prompt(each, tokenize_prompt(each, texts), clip_skip=skip)
            for name, (each, texts, skip) in others.items()
        }

    first = read()
    assert len(made) == len(others)
    again = read()
    assert len(made) == len(others)
    for name, features in first.items():
        np.testing.assert_array_equal(features.hidden, again[name].hidden)
    assert not any(
        one.hidden.shape == other.hidden.shape and (one.hidden == other.hidden).all()
        for one, other in zip(first.values(), list(first.values())[1:], strict=False)
    )


def test_a_network_that_is_changed_in_place_reads_again(models, made):
    encoder = jax.tree.map(lambda a: a, models("sd1").text_encoders["text_encoder"])
    model = dc.replace(models("sd1"), text_encoders={"text_encoder": encoder})
    tokens = tokenize_prompt(model, ["a cat"])
    before = encode_prompt(model, tokens).hidden
    encoder.text_model.final_layer_norm.bias[...] = encoder.text_model.final_layer_norm.bias[...] + 1
    after = encode_prompt(model, tokens).hidden
    assert len(made) == 2
    np.testing.assert_allclose(after - before, 1, atol=1e-5)


def test_nothing_of_a_trace(models, made):
    model = models("sd1")
    tokens = tokenize_prompt(model, ["a cat"])
    shape = jax.eval_shape(lambda: encode_prompt(model, tokens).hidden)
    found = jax.jit(lambda: encode_prompt(model, tokens).hidden)()
    assert len(made) == 2
    assert not memory._entries
    assert found.shape == shape.shape
    np.testing.assert_allclose(encode_prompt(model, tokens).hidden, found, atol=1e-5)
    assert np.isfinite(jax.jit(lambda tokens: encode_prompt(model, tokens).hidden)(tokens)).all()


def test_it_keeps_no_network_alive_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(memory, "_entries", type(memory._entries)())
    network = jnp.arange(3.0)
    gone = weakref.ref(network)
    calls = []
    for number in [0, *range(memory.MOST), 0]:
        remembered([network], np.array(number), (), lambda number=number: calls.append(number))
    assert len(memory._entries) == memory.MOST
    assert calls == list(range(memory.MOST)), "the one that was asked for again stayed"
    remembered([network], np.array(-1), (), lambda: calls.append(-1))
    remembered([network], np.array(1), (), lambda: calls.append(1))
    assert calls[-2:] == [-1, 1], "the oldest went"
    del network
    gc.collect()
    assert gone() is None
