"""Textual Inversion: every kind of file, and the same pictures as the torch pipelines make with it."""

from __future__ import annotations

import copy
import dataclasses as dc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from real_files import real_file
from sfumato.adapters.textual_inversion import Embedding, load_embedding, save_embedding
from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.model import Model
from sfumato.text.prompt import encode_prompt, tokenize_prompt
from sfumato.text.tokenizer import clip_tokenizer
from sfumato.text.words import find_word

from oracle import assert_close, from_torch
from runs import Pair

ONE, TWO = "text_encoder", "text_encoder_2"
WIDTHS = {"sd1": {ONE: 24}, "sdxl": {ONE: 12, TWO: 20}, "sdxl-refiner": {TWO: 20}}
"""Of the tiny models' text encoders."""


def vectors(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.5


def embedding(kind: str, token: str = "<Cat>", count: int = 3, seed: int = 0) -> Embedding:
    """One that fits the tiny model of a kind."""
    return Embedding(token, {name: vectors(count, width, seed=seed) for name, width in WIDTHS[kind].items()})


def write(path: Path, content: Any, **metadata: str) -> Path:
    import safetensors.numpy
    import torch

    def to_torch(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: to_torch(inner) for key, inner in value.items()}
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(content, path, metadata=metadata)
    else:
        torch.save(to_torch(content), path)
    return path


# Files

A1111 = {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors(2, 24)}, "name": "My Style", "step": 500}
LORA = {"unet:0:up": vectors(8, 4), "unet:0:down": vectors(4, 8)}
KOHYA = {"lora_unet_x.lora_up.weight": vectors(8, 4), "lora_unet_x.lora_down.weight": vectors(4, 8)}
PAIR = {"clip_l": vectors(2, 12), "clip_g": vectors(2, 20)}
FILES: dict[str, tuple[str, dict[str, Any], dict[str, str], str, dict[str, tuple[int, int]]]] = {
    "diffusers": ("a.bin", {"<cat>": vectors(24)}, {}, "<cat>", {ONE: (1, 24)}),
    "diffusers, several vectors": ("a.safetensors", {"<cat>": vectors(3, 24)}, {}, "<cat>", {ONE: (3, 24)}),
    "half precision": ("a.safetensors", {"<cat>": vectors(3, 24).astype(np.float16)}, {}, "<cat>", {ONE: (3, 24)}),
    "AUTOMATIC1111": ("a.pt", A1111, {}, "My Style", {ONE: (2, 24)}),
    "AUTOMATIC1111, safetensors": ("hands.safetensors", {"emb_params": vectors(2, 24)}, {}, "hands", {ONE: (2, 24)}),
    "SDXL": ("style.safetensors", PAIR, {}, "style", {ONE: (2, 12), TWO: (2, 20)}),
    "SDXL, second only": ("style.safetensors", {"clip_g": vectors(2, 20)}, {}, "style", {TWO: (2, 20)}),
    "refiner": ("a.bin", {"<cat>": vectors(1280)}, {}, "<cat>", {TWO: (1, 1280)}),
    "cloneofsimo": ("a.safetensors", LORA | {"<s1>": vectors(24)}, {"<s1>": "<embed>"}, "<s1>", {ONE: (1, 24)}),
    "bundle": ("a.safetensors", KOHYA | {"bundle_emb.cat.string_to_param.*": vectors(2, 24)}, {},
               "cat", {ONE: (2, 24)}),
    "SDXL bundle": ("a.safetensors", KOHYA | {f"bundle_emb.cat.{key}": value for key, value in PAIR.items()}, {},
                    "cat", {ONE: (2, 12), TWO: (2, 20)}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files(kind, tmp_path):
    name, content, metadata, token, shapes = FILES[kind]
    path = write(tmp_path / name, content, **metadata)
    loaded = load_embedding(path)
    assert loaded.token == token
    assert {key: value.shape for key, value in loaded.vectors.items()} == shapes
    assert all(value.dtype == np.float32 for value in loaded.vectors.values())
    own = load_embedding(path, token="<mine>")
    assert own.token == "<mine>"
    jax.tree.map(np.testing.assert_array_equal, own.vectors, loaded.vectors)


def test_the_numbers_are_those_of_the_file(tmp_path):
    path = write(tmp_path / "a.pt", A1111)
    np.testing.assert_array_equal(load_embedding(path).vectors[ONE], A1111["string_to_param"]["*"])


def test_old_files_of_parameters(tmp_path):
    import torch

    table = torch.nn.ParameterDict({"*": torch.nn.Parameter(torch.ones(2, 24))})
    torch.save({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": table}, tmp_path / "old.pt")
    assert load_embedding(tmp_path / "old.pt").token == "old"
    torch.save(torch.ones(2, 24), tmp_path / "bare.bin", _use_new_zipfile_serialization=False)
    assert load_embedding(tmp_path / "bare.bin").vectors[ONE].shape == (2, 24)


def test_a_file_with_several_tokens(tmp_path):
    path = write(tmp_path / "a.bin", {"<a>": vectors(24, seed=1), "<b>": vectors(24, seed=2)})
    np.testing.assert_array_equal(load_embedding(path, token="<b>").vectors[ONE], vectors(1, 24, seed=2))
    with pytest.raises(FileError, match=r"holds the tokens <a>, <b>; say with token= which is meant\."):
        load_embedding(path)
    with pytest.raises(FileError, match=r"holds the tokens <a>, <b>; '<c>' is none of them\."):
        load_embedding(path, token="<c>")


def test_folders(tmp_path):
    with pytest.raises(FileError, match="holds no embedding: neither learned_embeds"):
        load_embedding(tmp_path)
    write(tmp_path / "other.pt", A1111)
    assert load_embedding(tmp_path).token == "My Style"
    write(tmp_path / "more.bin", {"<more>": vectors(24)})
    with pytest.raises(FileError, match=r"holds more\.bin, other\.pt; name the one that is meant"):
        load_embedding(tmp_path)
    write(tmp_path / "learned_embeds.bin", {"<cat>": vectors(24)})
    assert load_embedding(tmp_path).token == "<cat>"
    write(tmp_path / "learned_embeds.safetensors", {"<dog>": vectors(24)})
    assert load_embedding(tmp_path).token == "<dog>"


@pytest.mark.parametrize(("content", "message"), [
    (KOHYA, "holds no vectors of a token"),
    ({"<cat>": vectors(2, 3, 24)}, r"is no embedding of a token: it holds <cat> of the shape \[2, 3, 24\]"),
    ({"<cat>": vectors(0, 24)}, r"of the shape \[0, 24\], where vectors \[D\] or \[n, D\] are expected"),
    ({"<cat>": np.full(24, np.nan, np.float32)}, "the vectors of '<cat>' hold numbers that are not finite"),
    ({"encoder.conv_in.weight": vectors(8, 3, 3, 3)}, "is a vae and no embedding of a token"),
    ({"controlnet_cond_embedding.conv_in.weight": vectors(8, 3, 3, 3)}, "is a controlnet and no embedding"),
    ({"adapter.body.0.resnets.0.block1.weight": vectors(8, 8, 3, 3)}, "is a T2I-Adapter.* and no embedding"),
    ({"layer.weight": vectors(8, 24)}, r"is no embedding of a token: it holds layer.weight of the shape \[8, 24\]"),
])  # fmt: skip
def test_files_of_other_things(content, message, tmp_path):
    with pytest.raises(FileError, match=message) as caught:
        load_embedding(write(tmp_path / "a.safetensors", content))
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        load_embedding(tmp_path / "a.bin")


@pytest.mark.parametrize("kind", WIDTHS)
def test_what_is_saved_loads_back(kind, tmp_path):
    cat = embedding(kind)
    again = load_embedding(save_embedding(cat, tmp_path))
    assert again.token == cat.token
    vectors = dict(again.vectors)
    if kind == "sdxl-refiner":  # a lone set of vectors is for any text encoder
        vectors = {TWO: vectors[ONE]}
    assert vectors.keys() == cat.vectors.keys()
    for name, want in cat.vectors.items():
        np.testing.assert_array_equal(vectors[name], want)


def test_saving_keeps_what_is_there(tmp_path):
    cat = embedding("sd1")
    file = save_embedding(cat, tmp_path)
    assert file == tmp_path / "learned_embeds.safetensors"
    with pytest.raises(SfumatoError, match="there already"):
        save_embedding(cat, file)
    assert save_embedding(cat, file, overwrite=True) == file
    with pytest.raises(SfumatoError, match="safetensors"):
        save_embedding(cat, tmp_path / "a.bin")


def test_the_real_files():
    loaded = load_embedding(real_file("sd15_textual_inversion.bin"))
    assert (loaded.token, loaded.vectors[ONE].shape) == ("<birb-style>", (1, 768))
    assert 0.1 < np.linalg.norm(loaded.vectors[ONE]) < 10
    assert clip_tokenizer().place(loaded.token).encode("a <birb-style> fox")[1] == 49408
    lora = real_file("sd15_lora_cloneofsimo_with_tokens.safetensors")
    with pytest.raises(FileError, match="holds the tokens <s1>, <s2>; say with token="):
        load_embedding(lora)
    assert load_embedding(lora, token="<s2>").vectors[ONE].shape == (1, 768)


# Models


def state(model: Model) -> list[Any]:
    return jax.tree.leaves([model.unet, model.vae, model.text_encoders])


def table(model: Model, name: str = ONE) -> np.ndarray:
    return np.asarray(model.text_encoders[name].text_model.embeddings.token_embedding.embedding[...])


def test_the_model_that_was_given_stays_as_it_is(loaded):
    model = loaded("sdxl")
    before, copies = state(model), [np.array(leaf) for leaf in state(model)]
    encode = {name: tokenizer.encode("a <Cat>") for name, tokenizer in model.tokenizers.items()}
    new = embedding("sdxl").apply(model)
    after = state(model)
    assert all(a is b for a, b in zip(before, after, strict=True))
    for leaf, copied in zip(after, copies, strict=True):
        np.testing.assert_array_equal(leaf, copied)
    assert {name: tokenizer.encode("a <Cat>") for name, tokenizer in model.tokenizers.items()} == encode
    assert {encoder.config.vocab_size for encoder in model.text_encoders.values()} == {49408}
    changed = [a for a, b in zip(before, state(new), strict=True) if a is not b]
    assert [a.shape for a in changed] == [(49408, 12), (49408, 20)], "all else is shared"


def test_rows_are_appended(loaded):
    model = loaded("sdxl")
    given = embedding("sdxl")
    new = given.apply(model)
    for name, added in given.vectors.items():
        encoder = new.text_encoders[name]
        assert encoder.config.vocab_size == encoder.text_model.embeddings.token_embedding.num_embeddings == 49411
        np.testing.assert_array_equal(table(new, name), np.concatenate([table(model, name), added]))
    for tokenizer in new.tokenizers.values():
        assert tokenizer.size == 49411
        assert tokenizer.encode("a <Cat>") == [320, 49408, 49409, 49410]


def test_strength(loaded, unchecked):
    model, given = loaded("sd1"), embedding("sd1", count=1)
    assert given.apply(model, 0) is model
    np.testing.assert_array_equal(table(given.apply(model, 0.5))[-1], given.vectors[ONE][0] * np.float32(0.5))
    for strength in (np.nan, "much"):
        with pytest.raises(SfumatoError, match="An embedding's strength must be a"):
            given.apply(model, strength)


def test_the_type_of_the_model_is_kept(loaded):
    model = loaded("sd1")
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.text_encoders[ONE])
    new = embedding("sd1").apply(dc.replace(model, text_encoders={ONE: half}))
    assert {leaf.dtype for leaf in jax.tree.leaves(new.text_encoders)} == {jnp.dtype(jnp.bfloat16)}


def test_a_single_vector_without_a_list(loaded):
    model, vector = loaded("sd1"), vectors(24)
    np.testing.assert_array_equal(table(Embedding("<cat>", {ONE: vector}).apply(model))[-1], vector)
    np.testing.assert_array_equal(table(Embedding("<cat>", {ONE: jnp.asarray(vector)}).apply(model))[-1], vector)


def test_it_is_a_pytree():
    given = embedding("sd1")
    half = jax.tree.map(lambda a: a * 0.5, given)
    assert half.token == "<Cat>"
    np.testing.assert_array_equal(half.vectors[ONE], given.vectors[ONE] * 0.5)


@pytest.mark.parametrize(("kind", "widths", "message"), [
    ("sd1", {ONE: 768}, r"'<cat>' has vectors of width 768 \(Stable Diffusion 1\.x\), and .* needs 24 \(Stable Diff"),
    ("sd1", {ONE: 1024}, r"of width 1024 \(Stable Diffusion 2\.x\), and .* needs 24"),
    ("sd1", {ONE: 768, TWO: 1280}, r"of width 768 and 1280 \(Stable Diffusion XL\), and .* needs 24"),
    ("sd1", {ONE: 24, TWO: 20}, "of width 20 and 24, and .* needs 24 "),
    ("sdxl", {ONE: 12}, r"of width 12, and .* needs 12 and 20 \(Stable Diffusion XL\)"),
    ("sdxl", {TWO: 20}, r"of width 20, and .* needs 12 and 20 \(Stable Diffusion XL\)"),
    ("sdxl", {ONE: 20, TWO: 12}, "of width 12 and 20, and .* needs 12 and 20"),
    ("sdxl-refiner", {ONE: 12}, r"of width 12, and .* needs 20 \(Stable Diffusion XL refiner\)"),
])  # fmt: skip
def test_vectors_of_another_width(kind, widths, message, loaded):
    with pytest.raises(MismatchError, match=message):
        Embedding("<cat>", {name: vectors(2, width) for name, width in widths.items()}).apply(loaded(kind))


def test_the_refiner_takes_what_is_its_own(loaded):
    model = loaded("sdxl-refiner")
    both = embedding("sdxl")
    for given in (both, Embedding("<Cat>", {TWO: both.vectors[TWO]}), Embedding("<Cat>", {ONE: both.vectors[TWO]})):
        np.testing.assert_array_equal(table(given.apply(model), TWO)[49408:], both.vectors[TWO])


def test_more_that_cannot_be_applied(loaded):
    model = loaded("sdxl")
    with pytest.raises(MismatchError, match="has 2 vectors for one text encoder and 3 for the other"):
        Embedding("<cat>", {ONE: vectors(2, 12), TWO: vectors(3, 20)}).apply(model)
    with pytest.raises(SfumatoError, match="Vectors are for text_encoder or text_encoder_2, not clip_l"):
        Embedding("<cat>", {"clip_l": vectors(2, 12)}).apply(model)
    with pytest.raises(MismatchError, match="has 76 vectors, and a chunk of a prompt has room for 75"):
        embedding("sdxl", count=76).apply(model)
    longer = dc.replace(model, tokenizers={name: each.place("<dog>") for name, each in model.tokenizers.items()})
    with pytest.raises(MismatchError, match="The tokenizer has 49409 tokens and the text encoder knows 49408"):
        embedding("sdxl").apply(longer)


def test_only_models_take_embeddings(loaded, unchecked):
    with pytest.raises(SfumatoError, match=r"is applied to a model .*, not to a UNet"):
        embedding("sd1").apply(loaded("sd1").unet)


@pytest.mark.parametrize("token", ["(cat)", "my [style]", r"a\(b\)", "one BREAK two"])
def test_tokens_with_signs_of_the_notation_are_refused(token, loaded):
    with pytest.raises(SfumatoError, match="holds signs that mean something else in a prompt; choose another name"):
        embedding("sd1", token).apply(loaded("sd1"))


def test_a_token_that_is_there_already_is_refused(loaded):
    model = embedding("sd1").apply(loaded("sd1"))
    with pytest.raises(SfumatoError, match="'<cat>' is in the model's vocabulary already as a placeholder; choose"):
        embedding("sd1", "<cat>").apply(model)
    with pytest.raises(SfumatoError, match="'Fox' is a word of the model's vocabulary already; choose another name"):
        embedding("sd1", "Fox").apply(model)
    embedding("sd1", "<other>").apply(model)


def test_the_old_way_to_name_the_end_of_text(loaded):
    """Before transformers fixed eos_token_id, pooled features were those of the highest token: now the placeholder."""
    model = loaded("sdxl-refiner")
    encoder = jax.tree.map(lambda a: a, model.text_encoders[TWO])
    encoder.config = dc.replace(encoder.config, eos_token_id=2)
    old = embedding("sdxl-refiner").apply(dc.replace(model, text_encoders={TWO: encoder}))
    new = embedding("sdxl-refiner").apply(model)
    tokens = tokenize_prompt(new, ["a <Cat> in the snow"])
    np.testing.assert_array_equal(encode_prompt(old, tokens).pooled, encode_prompt(new, tokens).pooled)
    assert old.text_encoders[TWO].config.eos_token_id == 49407


def test_words_are_found(loaded):
    model = embedding("sd1").apply(loaded("sd1"))
    tokenizer = model.tokenizers["tokenizer"]
    assert find_word(tokenizer, "a (<cat>:1.2), <Cat> BREAK fox <Cat>", "<Cat>") == [2, 3, 4, 6, 7, 8, 79, 80, 81]
    assert find_word(tokenizer, "a <cat> fox", "fox") == [5]


# Against the torch pipelines


def reference(kind: str, saved: Any, both: Pair, embeddings: list[Embedding]) -> Pair:
    """The torch pipeline with embeddings, and our model with them."""
    from transformers import CLIPTokenizer

    model, parts = both.model, {}
    for name in WIDTHS[kind]:
        parts[name] = copy.deepcopy(getattr(both.pipeline, name))
        side = name.replace("text_encoder", "tokenizer")
        parts[side] = CLIPTokenizer.from_pretrained(saved(kind)[0] / side)
    pair = both.through(type(both.pipeline).__name__, **parts)
    import torch

    for each in embeddings:
        model = each.apply(model)
        for name, value in each.vectors.items():
            pair.pipeline.load_textual_inversion(
                {each.token: torch.from_numpy(value)}, token=each.token, text_encoder=parts[name],
                tokenizer=parts[name.replace("text_encoder", "tokenizer")],
            )  # fmt: skip
    return dc.replace(pair, model=model)


PROMPTS = ["a <cat>, sitting!", "<cat>", "a photo of my-style's fox in <cat>my-style", "no such token", "(<cat>)<cat>"]


def theirs(pipeline: Any, prompts: list[str]) -> tuple[np.ndarray, np.ndarray | None]:
    import torch

    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    with torch.no_grad():
        context, _, *pooled = pipeline.encode_prompt(prompts, **options)
    return from_torch(context), from_torch(pooled[0]) if pooled else None


def compare(model: Model, pipeline: Any, prompts: list[str]) -> None:
    context, pooled = theirs(pipeline, prompts)
    got = encode_prompt(model, tokenize_prompt(model, prompts, weights=False))
    assert_close(got.hidden, context)
    if pooled is not None:
        assert_close(got.pooled, pooled)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_features_and_pictures_are_those_of_the_torch_pipeline(kind, saved, pair):
    both = reference(
        kind, saved, pair(kind, small=True), [embedding(kind, "<cat>"), embedding(kind, "my-style", 2, seed=1)]
    )
    compare(both.model, both.pipeline, PROMPTS)
    prompt = "a <cat> fox, my-style"
    ours, want = both.ours(prompt), both.theirs(prompt)
    both.assert_same(ours, want)
    assert np.abs(want - both.theirs("a fox")).max() > 0.01


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_single_vectors_are_found_in_any_case(kind, saved, pair):
    """As the torch pipeline finds them, which misses those of several vectors with a capital letter."""
    both = reference(kind, saved, pair(kind), [embedding(kind, "<Cat>", 1), embedding(kind, "myStyle", 1, seed=1)])
    compare(both.model, both.pipeline, ["a <cat>, sitting <CAT>!", "<Cat>", "a photo of mystyle's fox in <cAT>MYSTYLE"])


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_files_mean_what_they_mean_to_the_torch_pipeline(kind, saved, pair, tmp_path):
    if kind == "sd1":
        path = write(tmp_path / "a.pt", A1111 | {"name": "my-style"})
    else:
        path = write(tmp_path / "my-style.safetensors", PAIR)
    ours = load_embedding(path)
    both = reference(kind, saved, pair(kind), [])
    if kind == "sd1":
        both.pipeline.load_textual_inversion(str(path))
    else:
        import torch

        for key, name in (("clip_l", ONE), ("clip_g", TWO)):
            both.pipeline.load_textual_inversion(
                torch.from_numpy(PAIR[key]), token="my-style", text_encoder=getattr(both.pipeline, name),
                tokenizer=getattr(both.pipeline, name.replace("text_encoder", "tokenizer")),
            )  # fmt: skip
    compare(ours.apply(both.model), both.pipeline, ["a fox in my-style, night", "a fox"])


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_saved_model_keeps_its_tokens(kind, loaded, tmp_path):
    import diffusers

    model = embedding(kind, "my-style", 2).apply(embedding(kind, "<cat>").apply(loaded(kind)))
    sfumato.save(model, tmp_path / "model")
    again = sfumato.load(tmp_path / "model")
    for a, b in zip(state(model), state(again), strict=True):
        np.testing.assert_array_equal(a, b)
    for prompt in PROMPTS:
        leaves = (jax.tree.leaves(tokenize_prompt(each, [prompt])) for each in (model, again))
        assert all((a == b).all() for a, b in zip(*leaves, strict=True))
    with pytest.raises(SfumatoError, match="already"):
        embedding(kind).apply(again)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    # The reference puts the further names into the text, where a letter may then follow a letter.
    compare(again, pipeline, [prompt.replace(">my", "> my") for prompt in PROMPTS])
