"""Textual Inversion: the same step as the reference's, and files that give the trained word."""

from __future__ import annotations

import copy
from typing import Any

import jax
import numpy as np
import pytest

import sfumato
from sfumato.errors import SfumatoError
from sfumato.train.recipes.text_to_image import text_to_image
from sfumato.train.recipes.textual_inversion import TEMPLATES, textual_inversion

from training import Reference, assert_near, batch, beside, draws, step

TOKEN = "<fox>"
TEXTS = ["a <fox> in the snow", "<fox>", "a photo of a boat and <fox>"]


def spoken(pipeline: Any, folder: Any, vectors: Any) -> tuple[Any, dict[str, Any]]:
    """A copy of a pipeline with a word, and the tables that hold its vectors."""
    import torch
    from transformers import CLIPTokenizer

    parts = {name: copy.deepcopy(part) if hasattr(part, "parameters") else part
             for name, part in pipeline.components.items()}  # fmt: skip
    for name in vectors:
        side = name.replace("text_encoder", "tokenizer")
        parts[side] = CLIPTokenizer.from_pretrained(folder / side)
    other, tables = type(pipeline)(**parts), {}
    for name, value in vectors.items():
        encoder, tokenizer = parts[name], parts[name.replace("text_encoder", "tokenizer")]
        other.load_textual_inversion(
            {TOKEN: torch.from_numpy(np.array(value))}, token=TOKEN, text_encoder=encoder, tokenizer=tokenizer
        )
        tables[name] = encoder.get_input_embeddings().weight
    return other, tables


def written_out(pipeline: Any, data: dict[str, Any]) -> dict[str, Any]:
    """The batch with a token for each vector, which the reference's pipelines put in before they read a prompt."""
    return data | {"text": [pipeline.maybe_convert_prompt(text, pipeline.tokenizer) for text in data["text"]]}


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_five_steps_are_those_of_the_reference(kind, saved, pair):
    import torch

    both = pair(kind, small=True)
    task = textual_inversion(both.model, TOKEN, vectors=3, start="a red fox", templates=None)
    pipeline, tables = spoken(both.pipeline, saved(kind)[0], task.trainable)
    reference, rest = Reference(pipeline, {}), {name: table.detach()[:-3].clone() for name, table in tables.items()}

    def loss(rows: dict[str, Any], drawn: Any) -> Any:
        return reference.loss(written_out(pipeline, rows), drawn)

    data = [batch(number) | {"text": TEXTS} for number in range(5)]
    for vectors, gradients in beside(task, draws(5), data, tables.values(), loss):
        assert_near(gradients, {name: table.grad[-3:] for name, table in tables.items()})
        assert_near(vectors, {name: table.detach()[-3:] for name, table in tables.items()})
        with torch.no_grad():  # the other words stay as they are
            for name, table in tables.items():
                table[:-3] = rest[name]


# The start


def test_what_the_vectors_start_from(loaded):
    model = loaded("sdxl")
    tables = {
        name: np.asarray(encoder.text_model.embeddings.token_embedding.embedding[...])
        for name, encoder in model.text_encoders.items()
    }
    fox, red = (model.tokenizers["tokenizer"].encode(word)[0] for word in ("fox", "red"))
    for start, count, rows in (
        ("fox", 2, [[fox], [fox]]), ("red fox", 3, [[red], [fox], [red]]), ("red fox", 1, [[red, fox]]),
        (None, 1, [range(49408)]),
    ):  # fmt: skip
        trainable = textual_inversion(model, TOKEN, vectors=count, start=start).trainable
        assert trainable.keys() == model.text_encoders.keys()
        for name, table in tables.items():
            assert trainable[name].dtype == np.float32
            want = np.stack([table[list(row)].mean(0) for row in rows])
            np.testing.assert_allclose(trainable[name], want, atol=1e-6)


def test_nothing_is_copied_but_the_table(loaded):
    model = loaded("sd1")
    task = textual_inversion(model, TOKEN, vectors=2)
    assert task.frozen["unet"].conv_in.kernel[...] is model.unet.conv_in.kernel[...]
    table = task.frozen["text_encoder"].text_model.embeddings.token_embedding.embedding
    assert table.shape == (49410, 24)


def test_bad_settings(loaded):
    model = loaded("sd1")
    for token, settings, message in (
        (TOKEN, {"vectors": 0}, "at least 1"), (TOKEN, {"start": " "}, "no tokens"), ("fox", {}, "already"),
        (TOKEN, {"vectors": 76}, "room for 75"), (TOKEN, {"templates": ["a fox"]}, "'a fox' does not"),
        (TOKEN, {"templates": "a fox"}, "'a fox' does not"), (TOKEN, {"templates": []}, "none"),
    ):  # fmt: skip
        with pytest.raises(SfumatoError, match=message):
            textual_inversion(model, token, **settings)
    with pytest.warns(), pytest.raises(SfumatoError, match="do not fit into the caption 'a photo of"):
        textual_inversion(model, TOKEN, vectors=75)


# Captions


def test_the_templates_are_different_captions():
    for name, templates in TEMPLATES.items():
        assert len(templates) == len(set(templates)) > 15, name
        assert all(template.count("{}") == 1 for template in templates)


@pytest.mark.slow
def test_each_picture_gets_a_caption_by_the_key(models):
    model, data = models("sd1"), batch()
    del data["text"]
    task = textual_inversion(model, TOKEN, start="fox", templates=["{}", "a {} in the snow"])
    assert task.collate(data).keys() == {"pixels"}
    run = jax.jit(task.loss)
    losses = [float(run(task.trainable, task.frozen, task.collate(data), jax.random.key(i))[0]) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


# The end


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_files_give_the_trained_model(kind, models, saved, pair, tmp_path):
    model, drawn = models(kind), draws()[0]
    data = batch() | {"text": TEXTS}
    task = textual_inversion(model, TOKEN, vectors=3, start="a red fox", templates=None)
    trained = {name: value + 0.3 for name, value in task.trainable.items()}
    task.export(trained, tmp_path / "new")
    embedding = sfumato.load_embedding(tmp_path / "new" / "learned_embeds.safetensors")
    assert embedding.token == TOKEN
    for name, value in trained.items():
        np.testing.assert_array_equal(embedding.vectors[name], value)
    plain = text_to_image(embedding.apply(model))
    assert step(plain, plain.trainable, data, drawn)[0] == pytest.approx(step(task, trained, data, drawn)[0], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parity
def test_the_reference_loads_the_file(saved, pair, tmp_path):
    both, data = pair("sd1", small=True), batch() | {"text": TEXTS}
    task = textual_inversion(both.model, TOKEN, vectors=2, templates=None)
    trained = {name: value + 0.3 for name, value in task.trainable.items()}
    task.export(trained, tmp_path)
    pipeline, _ = spoken(both.pipeline, saved("sd1")[0], {})
    from transformers import CLIPTokenizer

    pipeline.tokenizer = CLIPTokenizer.from_pretrained(saved("sd1")[0] / "tokenizer")
    pipeline.load_textual_inversion(str(tmp_path))
    loss = Reference(pipeline, {}).loss(written_out(pipeline, data), draws()[0]).detach()
    assert step(task, trained, data, draws()[0])[0] == pytest.approx(float(loss), rel=1e-4)
