"""The embedded model before its training."""

from __future__ import annotations

import pytest
from flax import nnx

import sfumato
from sfumato.models.clip import ClipTextEncoder
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from tools.embedded.start import LENGTH, SCALES, autoencoder, text_encoder, unet, vocabulary

TEXTS = [f"a {colour} {thing}, noto style" for colour in ("red", "green") for thing in ("apple", "fox", "house")] * 2


@pytest.fixture(scope="module")
def words():
    return vocabulary(TEXTS)


def test_words_of_the_captions_are_one_token_each_and_others_are_spelt(words):
    assert [len(word.ids) for word in words.split("A red  FOX, noto style")] == [1] * 6
    assert words.decode(words.encode("zebra, crème brûlée")) == "zebra , crème brûlée"
    assert words.max_length == LENGTH


@pytest.mark.parity
def test_transformers_reads_the_same_tokens(words, tmp_path):
    from transformers import CLIPTokenizer

    words.save(tmp_path)
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    texts = ["a red apple, noto style", "Zebra's 12 houses", ""]
    assert theirs(texts, padding="max_length", truncation=True).input_ids == words(texts).tolist()


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale_is_a_model_that_fits_together(words, scale):
    numbers = SCALES[scale]
    net, text = unet(**numbers), text_encoder(words, **numbers)
    assert net.cross_attention_dim == text.hidden_size
    assert net.in_channels == autoencoder().latent_channels
    assert nnx.state(abstract(UNet, net))
    assert nnx.state(abstract(ClipTextEncoder, text))


def test_the_whole_model_is_saved_and_loaded(words, tmp_path, monkeypatch):
    from tools.embedded import start

    tiny = {"channels": (8, 8, 8), "layers": 1, "heads": 2, "width": 8, "depth": 1, "groups": 4}
    monkeypatch.setitem(start.SCALES, "tiny", tiny)
    sfumato.save(start.start(TEXTS, "tiny"), tmp_path / "start")
    model = sfumato.load(tmp_path / "start")
    assert model.schedule.prediction_type == "v_prediction"
    assert model.tokenizers["tokenizer"].encode("a fox") == words.encode("a fox")
    assert model.unet.config.cross_attention_dim == 8
