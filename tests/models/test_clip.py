"""The text encoders against the torch reference, on tiny random models."""

from __future__ import annotations

import dataclasses as dc
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfumato.errors import SfumatoError
from sfumato.io.fill import fill, slots
from sfumato.models.clip import (
    OPEN_CLIP_BIG_G,
    OPEN_CLIP_H,
    PROJECTED,
    VIT_L_14,
    ClipTextConfig,
    ClipTextEncoder,
    TextFeatures,
)
from sfumato.models.config import from_dict, to_dict
from sfumato.models.layers import abstract

from oracle import assert_close, fresh, from_torch, lazy, seeded, to_torch

BOS, EOS = 98, 99
TINY = ClipTextConfig(
    vocab_size=100, hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=12, projection_dim=24, bos_token_id=BOS, eos_token_id=EOS,
)  # fmt: skip
PROJECTING = dc.replace(TINY, architectures=(PROJECTED,))
OLD = {"eos_token_id": 2, "bos_token_id": 0}
CONFIGS = {
    "ViT-L": TINY,
    "OpenCLIP-H": dc.replace(TINY, hidden_act="gelu", **OLD),
    "bigG": dc.replace(PROJECTING, hidden_act="gelu", **OLD),
    "projected, new eos": PROJECTING,
}


def prompts(pad: int) -> np.ndarray:
    """Rows that end at several places, one with no room for padding."""
    rows = np.full((4, 12), pad)
    for row, words in zip(rows, ([5], [7, 8, 9, 10, 11, 12], [], list(range(20, 30))), strict=True):
        row[: len(words) + 2] = [BOS, *words, EOS]
    return rows


def reference(config: ClipTextConfig) -> Any:
    """The torch model of a configuration, every parameter random and large enough to matter."""
    import torch
    import transformers

    name = PROJECTED if config.projects else "CLIPTextModel"
    model = seeded(lambda: getattr(transformers, name)(transformers.CLIPTextConfig(**to_dict(config))))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def filled(config: ClipTextConfig, model: Any) -> ClipTextEncoder:
    """Ours with the reference's weights; the bare model of new transformers lacks the prefix of the files."""
    prefix = "" if config.projects else "text_model."
    state = {prefix + key: tensor for key, tensor in lazy(model.state_dict()).items()}
    return fill(abstract(ClipTextEncoder, config), state)


def run(model: Any, ids: np.ndarray) -> Any:
    import torch

    return model(torch.from_numpy(ids), output_hidden_states=True)


def final_norm(model: Any) -> Any:
    return getattr(model, "text_model", model).final_layer_norm


def with_remat(model: ClipTextEncoder, remat: bool) -> ClipTextEncoder:
    model = nnx.clone(model)
    model.remat = remat
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[ClipTextEncoder, Any]:
    config = CONFIGS[request.param]
    theirs = reference(config)
    return filled(config, theirs), theirs


@jax.jit
def everything(model: ClipTextEncoder, ids: jax.Array) -> dict[tuple[int, bool], TextFeatures]:
    """The features for each number of skipped layers, with and without the final norm."""
    return {(skip, norm): model(ids, skip, norm) for skip in range(3) for norm in (False, True)}


@pytest.mark.parity
@pytest.mark.parametrize("pad", [EOS, 0])
def test_every_layer_and_the_pooled_features(pair, pad):
    ours, theirs = pair
    expected, got = run(theirs, prompts(pad)), everything(ours, prompts(pad))
    assert_close(got[0, True].hidden, from_torch(expected.last_hidden_state))
    for skip in range(3):
        state = expected.hidden_states[-1 - skip]
        assert_close(got[skip, False].hidden, from_torch(state))
        assert_close(got[skip, True].hidden, from_torch(final_norm(theirs)(state)))
    for features in got.values():
        if ours.config.projects:
            assert_close(features.pooled, from_torch(expected.text_embeds))
        else:
            assert features.pooled is None


@pytest.mark.parity
def test_the_gradient_of_the_token_embeddings(pair):
    ours, theirs = pair
    ids, weights = prompts(EOS), np.random.default_rng(0).normal(size=(4, 12, 32)).astype(np.float32)

    @jax.jit
    @jax.grad
    def gradient(model: ClipTextEncoder) -> jax.Array:
        return (model(jnp.asarray(ids)).hidden * weights).sum()

    remat = ours.config.projects  # half of the models with, half without checkpointing
    got = gradient(with_remat(ours, remat)).text_model.embeddings.token_embedding.embedding[...]
    theirs.zero_grad()
    (run(theirs, ids).last_hidden_state * to_torch(weights)).sum().backward()
    table = getattr(theirs, "text_model", theirs).embeddings.token_embedding.weight
    assert_close(got, from_torch(table.grad))


def test_checkpointing_recomputes_every_layer():
    model, ids = fresh(ClipTextEncoder, TINY, 0), jnp.asarray(prompts(EOS))
    gradient = jax.make_jaxpr(jax.grad(lambda model: model(ids).hidden.sum()))
    programs = [str(gradient(with_remat(model, remat))) for remat in (False, True)]
    assert [program.count("= remat") for program in programs] == [0, 2]


@pytest.mark.parametrize("config", [TINY, CONFIGS["bigG"]], ids=["ViT-L", "bigG"])
def test_bfloat16_is_finite_and_close(config):
    wide = fresh(ClipTextEncoder, config, 1)
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), wide)
    encode = jax.jit(lambda model: model(jnp.asarray(prompts(EOS))))
    got, expected = encode(narrow), encode(wide)
    assert {a.dtype for a in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(a.astype(jnp.float32), b, tol=0.03)


def test_later_words_do_not_change_earlier_features():
    model, ids = fresh(ClipTextEncoder, TINY, 2), prompts(EOS)
    changed = ids.copy()
    changed[:, 6:] = 3
    before, after = (np.asarray(model(jnp.asarray(rows)).hidden) for rows in (ids, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert np.abs(before[:, 6:] - after[:, 6:]).min(axis=(0, 2)).max() > 0


@pytest.mark.parametrize("eos", [EOS, 2])
def test_added_tokens_reach_the_table_and_do_not_pass_for_the_end(eos):
    model = fresh(ClipTextEncoder, dc.replace(PROJECTING, eos_token_id=eos), 3)
    table = model.text_model.embeddings.token_embedding
    table.embedding = nnx.Param(jnp.concatenate([table.embedding[...], table.embedding[5:6]]))
    plain, added = np.array([[BOS, 5, EOS, EOS]]), np.array([[BOS, 100, EOS, EOS]])
    for a, b in zip(*(jax.tree.leaves(model(jnp.asarray(ids))) for ids in (plain, added)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("ids", "skip", "message"), [
    (np.zeros((1, 13), int), 0, "13 tokens are more than the 12"),
    (np.zeros((1, 4), int), 4, "has 2 layers, so it cannot skip 4"),
    (np.zeros((1, 4), int), -1, "cannot skip -1"),
])  # fmt: skip
def test_what_does_not_fit_is_said(ids, skip, message):
    with pytest.raises(SfumatoError, match=message):
        fresh(ClipTextEncoder, TINY, 0)(jnp.asarray(ids), skip)


@pytest.mark.parametrize(("change", "message"), [
    ({"hidden_act": "tanhish"}, "hidden_act 'tanhish' is not supported"),
    ({"num_attention_heads": 5}, "num_attention_heads=5 does not divide hidden_size=32"),
    ({"architectures": [PROJECTED], "projection_dim": None}, "needs projection_dim"),
])  # fmt: skip
def test_a_configuration_that_cannot_be_is_refused(change, message):
    with pytest.raises(SfumatoError, match=f"text_encoder/config.json: .*{message}"):
        from_dict(ClipTextConfig, to_dict(TINY) | change, "text_encoder/config.json")


@pytest.mark.parity
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("config", [VIT_L_14, OPEN_CLIP_H, OPEN_CLIP_BIG_G], ids=["L", "H", "bigG"])
def test_the_real_configurations_have_the_keys_and_shapes_of_the_reference(config):
    import torch
    import transformers

    name = PROJECTED if config.projects else "CLIPTextModel"
    raw = transformers.CLIPTextConfig(**to_dict(config)).to_diff_dict() | {"architectures": [name]}
    assert from_dict(ClipTextConfig, raw) == config
    with torch.device("meta"):
        state = getattr(transformers, name)(transformers.CLIPTextConfig(**raw)).state_dict()
    prefix = "" if config.projects else "text_model."
    ours = slots(abstract(ClipTextEncoder, config))
    expected = {prefix + key: tuple(tensor.shape) for key, tensor in state.items()}
    assert {key: slot.stored for key, slot in ours.items()} == expected
