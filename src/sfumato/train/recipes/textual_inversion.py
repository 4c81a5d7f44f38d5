"""Textual Inversion (arXiv:2208.01618): a new word, whose vectors are all that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int32

from sfumato.adapters.live import copied
from sfumato.adapters.textual_inversion import Embedding, save_embedding
from sfumato.errors import SfumatoError
from sfumato.images import Images
from sfumato.io.load import tokenizer_name
from sfumato.model import Model
from sfumato.models.clip import ClipTextEncoder
from sfumato.train.denoising import Denoising, Nets, check_channels, collate, networks, tokens, with_networks
from sfumato.train.objective import Objective
from sfumato.train.samples import Sampling, drawn
from sfumato.train.task import Batch, Metrics, Task
from sfumato.types import Numbers

Vectors = Mapping[str, Any]
"""The vectors [n, D] of the word, by component name of the text encoder."""

OBJECT = (
    "a photo of {}", "a picture of {}", "one photo of {}", "a close view of {}", "{} up close", "a sharp photo of {}",
    "a blurred photo of {}", "a bright photo of {}", "a photo of {} in dim light", "a photo with {} in the middle",
    "{} seen from nearby", "{} seen from far away", "a good picture of {}", "a plain snapshot of {}", "here is {}",
    "a small photo of {}", "a large photo of {}", "a beautiful {}", "a picture that shows {}", "just {}",
)  # fmt: skip
STYLE = (
    "a painting in the style of {}", "a picture in the style of {}", "a drawing in the style of {}", "art like {}",
    "a scene painted like {}", "{}, a painting", "a print in the style of {}", "a detail painted in the style of {}",
    "a small painting in the style of {}", "a large painting in the style of {}", "a quiet scene in the style of {}",
    "a bright painting in the style of {}", "a dark painting in the style of {}", "a sketch in the style of {}",
    "everyday things in the style of {}", "a good painting in the style of {}", "colours and forms of {}",
)  # fmt: skip
TEMPLATES = {"object": OBJECT, "style": STYLE}
"""Captions of all pictures; {} is the word."""


def textual_inversion(
    model: Model, token: str, objective: Objective | None = None, *, vectors: int = 1, start: str | None = None,
    templates: str | Sequence[str] | None = "object", dtype: str | None = None, remat: bool = False,
) -> Task:  # fmt: skip
    """Trains the `vectors` of a new word `token` for each text encoder; networks and vocabulary stay as they are.

    They start from those of the words `start`, in turn if there are fewer of them and all from their mean if there are
    more, or from the mean of the vocabulary. `templates` are captions with {} for the word ("object", "style", or some
    of your own), of which each picture gets another one in each step; None takes the captions of the data, with the
    word in them. The rest is as in `text_to_image`. Exports learned_embeds.safetensors. Raises SfumatoError for a token
    that cannot be one, captions without room for it, and models that take more than latents.
    """
    check_channels(model, "Textual Inversion")
    if vectors < 1:
        raise SfumatoError(f"A word has at least 1 vector, not {vectors}.")
    first = {name: starting(model, name, vectors, start) for name in model.text_encoders}
    spoken = Embedding(token, first).apply(model)
    denoise, captions = Denoising.of(spoken, objective), None
    if templates is not None:
        captions = _captions(spoken, token, vectors, TEMPLATES.get(templates, (templates,))
                             if isinstance(templates, str) else templates)  # fmt: skip

    def loss(trained: Vectors, frozen: Nets, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        if captions is not None:
            rows = len(batch["latents"] if "latents" in batch else batch["pixels"])
            key, other = jax.random.split(key)
            chosen = jax.random.randint(other, (rows,), 0, len(next(iter(captions.values()))))
            batch = {**batch, "tokens": {name: jnp.asarray(ids)[chosen] for name, ids in captions.items()}}
        heard = {name: with_vectors(frozen[name], value) for name, value in trained.items()}
        return denoise({**frozen, **heard}, batch, key)

    def prepare(batch: Batch) -> dict[str, Any]:
        batch = {name: value for name, value in batch.items() if name not in ("context", "pooled")}  # of other words
        if captions is None:
            return collate(spoken, batch)
        arrays = collate(spoken, {**batch, "text": []})
        return {name: value for name, value in arrays.items() if name != "tokens"}

    def export(trained: Vectors, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_embedding(Embedding(token, trained), folder, overwrite=True)

    def draw(trained: Vectors, wishes: Sampling) -> Images:
        heard = {name: with_vectors(spoken.text_encoders[name], value) for name, value in trained.items()}
        return drawn(with_networks(spoken, heard), wishes)

    return Task(first, networks(spoken, dtype=dtype, remat=remat), loss, prepare, export, draw)


def with_vectors(encoder: ClipTextEncoder, vectors: Float[Numbers, "n D"]) -> ClipTextEncoder:
    """The text encoder with these for the last rows of its table; all other arrays are the same."""
    new = copied(encoder)
    table = new.text_model.embeddings.token_embedding.embedding
    table.set_value(table[...].at[-len(vectors) :].set(vectors.astype(table.dtype)))
    return new


def starting(model: Model, name: str, count: int, words: str | None) -> Float[np.ndarray, "n D"]:
    """What the vectors of a text encoder start from. Raises SfumatoError for words without any letter."""
    tokenizer = model.tokenizers[tokenizer_name(name)]
    table = np.asarray(model.text_encoders[name].text_model.embeddings.token_embedding.embedding[...], np.float32)
    rows = table[: tokenizer.size] if words is None else table[tokenizer.encode(words)]
    if not len(rows):
        raise SfumatoError(f"The word {words!r} to start from has no tokens.")
    return np.array(np.resize(rows if len(rows) <= count else rows.mean(0, keepdims=True), (count, rows.shape[1])))


def _captions(model: Model, token: str, count: int, templates: Sequence[str]) -> dict[str, Int32[np.ndarray, "K L"]]:
    """The tokens of all captions by text encoder. Raises SfumatoError for one that the word is not read in."""
    wrong = [text for text in templates if "{}" not in text]
    if wrong or not templates:
        raise SfumatoError(
            f"Templates hold {{}} for the word, and {f'{wrong[0]!r} does not' if wrong else 'there are none'}."
        )
    ids = tokens(model, [text.replace("{}", token) for text in templates])
    for name, rows in ids.items():
        new = range(model.tokenizers[tokenizer_name(name)].size - count, model.tokenizers[tokenizer_name(name)].size)
        lost = [text for text, row in zip(templates, rows, strict=True) if not set(new) <= set(row.tolist())]
        if lost:
            raise SfumatoError(f"The {count} vectors of {token!r} do not fit into the caption {lost[0]!r}.")
    return ids
