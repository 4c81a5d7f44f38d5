"""From prompts to the text features that the UNet sees: weights, prompts of any length, one text encoder or two.

The notation is that of AUTOMATIC1111's web UI, which prompts are commonly shared in:

| text                     | meaning                                                |
|--------------------------|--------------------------------------------------------|
| `(fox)`                  | weight 1.1                                             |
| `[fox]`                  | weight 1 / 1.1                                         |
| `(fox:1.3)`              | weight 1.3                                             |
| `((fox) in snow)`        | nested weights multiply                                |
| `\\( \\) \\[ \\] \\\\`        | the sign itself                                        |
| `a fox BREAK a forest`   | what follows is encoded on its own, in a chunk of 75   |

A bracket without a partner is read as it stands.
"""

from __future__ import annotations

import functools
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from sfumato.errors import SfumatoError
from sfumato.io.family import Family
from sfumato.io.load import tokenizer_name
from sfumato.kept import Kept
from sfumato.model import Model
from sfumato.models.clip import ClipTextEncoder, TextFeatures
from sfumato.text.memory import remembered
from sfumato.text.tokenizer import Tokenizer, TruncationWarning, Word
from sfumato.types import pytree

STRONGER = {"(": 1.1, "[": 1 / 1.1}
"""The weight of a bracket that gives none."""

PARTNERS = {")": "(", "]": "["}

SIGNS = re.compile(r"\\(?P<escaped>[()\[\]\\])|[(\[]|(?::\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*)?\)|\]")
"""What is not plain text: an escaped sign, an opening bracket, a closing one with or without a weight."""

SMALLEST_MEAN = 1e-4
"""The mean of features that is told from 0, in shares of their root mean square."""

BREAK = re.compile(r"\bBREAK\b")

READING = {
    Family.SD1: (0, True), Family.SD2: (0, True), Family.SDXL: (1, False), Family.SDXL_REFINER: (1, False),
}  # fmt: skip
"""How many of the last layers are skipped, and whether the final norm follows: see `sfumato.models.clip`."""


@pytree
class Tokens:
    """Prompts as token ids, in chunks of the length that a text encoder takes."""

    ids: Int32[np.ndarray | Array, "B n L"]
    """Every chunk has a start token, up to L - 2 tokens of the prompt, the end token and padding."""
    weights: Float32[np.ndarray | Array, "B n L"]
    """How much each token counts: 1 is plain."""


def parse(text: str) -> list[tuple[str, float]]:
    """The parts of a prompt with their weights; adjacent ones differ in weight, and none is empty."""
    signs = list(SIGNS.finditer(text))
    factors, pieces, outer, weight, at = _factors(signs), [], [], 1.0, 0
    for number, sign in enumerate(signs):
        pieces.append((text[at : sign.start()], weight))
        at = sign.end()
        if number not in factors:
            pieces.append((sign["escaped"] or sign.group(), weight))
        elif sign.group() in STRONGER:
            outer.append(weight)
            weight *= factors[number]
        else:
            weight = outer.pop()
    pieces.append((text[at:], weight))
    groups = itertools.groupby((piece for piece in pieces if piece[0]), key=lambda piece: piece[1])
    return [("".join(words for words, _ in group), weight) for weight, group in groups]


def _factors(signs: Sequence[re.Match[str]]) -> dict[int, float]:
    """The weight of every bracket that has a partner, by its number among the signs."""
    factors: dict[int, float] = {}
    waiting: dict[str, list[int]] = {"(": [], "[": []}
    for number, sign in enumerate(signs):
        if sign["escaped"]:
            continue
        last = sign.group()[-1]
        if last in waiting:
            waiting[last].append(number)
        elif waiting[PARTNERS[last]]:
            start = waiting[PARTNERS[last]].pop()
            factors[start] = factors[number] = float(sign["weight"] or STRONGER[PARTNERS[last]])
            for others in waiting.values():
                while others and others[-1] > start:  # opened inside and not closed there
                    others.pop()
    return factors


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], *, weights: bool = True, long: bool = True, chunks: int = 1,
) -> Tokens:  # fmt: skip
    """The tokens of prompts, all in the same number of chunks: what the longest needs, and at least `chunks`.

    Without `weights` brackets and backslashes are text like any other. Without `long` a prompt has one chunk: what
    does not fit is cut off with a TruncationWarning, and BREAK is a word. Raises SfumatoError for anything but a
    sequence of strings with at least one, and for a weight that is no finite number.
    """
    if isinstance(texts, str) or not texts:
        raise SfumatoError(f"The tokenizer takes a list of prompts with at least one, not {texts!r}.")
    prompts = []
    for text in texts:
        words = read(tokenizer, text, weights=weights, long=long)
        prompts.append((words, lay_out(tokenizer, [word for word, _ in words], long=long)))
    length = tokenizer.max_length
    last = max((at for _, places in prompts for positions in places for at in positions), default=0)
    shape = (len(texts), max(chunks, last // length + 1), length)
    ids, factors = np.full(shape, tokenizer.pad, np.int32), np.ones(shape, np.float32)
    ids[..., 0], ids[..., 1] = tokenizer.bos, tokenizer.eos
    for text, (words, places), row, factor in zip(texts, prompts, ids, factors, strict=True):
        # Ascending, so that of each chunk the last position remains.
        ends = {at // length: at + 1 for positions in places for at in positions}
        row.reshape(-1)[list(ends.values())] = tokenizer.eos
        for (word, weight), positions in zip(words, places, strict=True):
            row.reshape(-1)[positions] = word.ids[: len(positions)] if word else []
            with np.errstate(over="ignore"):
                factor.reshape(-1)[positions] = weight
        if not np.isfinite(factor).all():
            raise SfumatoError(f"A weight in the prompt {_shortened(text)!r} is too large; 1 is plain, 1.5 much.")
    return Tokens(ids, factors)


def read(
    tokenizer: Tokenizer, text: str, *, weights: bool = True, long: bool = True
) -> list[tuple[Word | None, float]]:  # fmt: skip
    """The words of a prompt with their weights; None stands for a BREAK. Arguments and errors as of `tokenize`."""
    if not isinstance(text, str):
        raise SfumatoError(f"A prompt must be a string, not {text!r}.")
    words = []
    for part, weight in parse(text) if weights else [(text, 1.0)]:
        for number, piece in enumerate(BREAK.split(part) if long else [part]):
            words += [(None, weight)] if number else []
            words += [(word, weight) for word in tokenizer.split(piece)]
    return words


def lay_out(tokenizer: Tokenizer, words: Sequence[Word | None], *, long: bool = True) -> list[list[int]]:
    """The positions of each word's tokens in the chunks of a prompt, counted through all chunks side by side.

    A chunk is filled before the next begins, only that a placeholder is never divided. Without `long` there is one
    chunk: what does not fit has no positions, and a TruncationWarning quotes it.
    """
    length, room, chunk, filled = tokenizer.max_length, tokenizer.max_length - 2, 0, 0
    places: list[list[int]] = []
    for word in words:
        count = len(word.ids) if word else 0
        if long and filled and (word is None or (word.placeholder and filled + count > room)):
            chunk, filled = chunk + 1, 0
        places.append([])
        for _ in range(count):
            if long and filled == room:
                chunk, filled = chunk + 1, 0
            filled += 1
            places[-1].append(chunk * length + filled)
    if long or filled <= room:
        return places
    lost = " ".join(word.text for word, at in zip(words, places, strict=True) if word and at[-1] > room)
    message = f"The prompt has {filled} tokens and only {room} are read; cut off was: {lost}"
    warnings.warn(message, TruncationWarning, stacklevel=3)
    return [[at for at in positions if at <= room] for positions in places]


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


def tokenize_prompt(
    model: Model, prompt: Sequence[str], prompt_2: Sequence[str] | None = None, *, weights: bool = True,
    long: bool = True, chunks: int = 1,
) -> dict[str, Tokens]:  # fmt: skip
    """The tokens of prompts for every text encoder of `model`, by component name, all in equally many chunks.

    `prompt_2` is what the second text encoder of SDXL reads instead. Raises SfumatoError if there is no second one
    or not as many prompts for it, and as `tokenize`.
    """
    texts = dict.fromkeys(model.text_encoders, prompt)
    if prompt_2 is not None:
        if len(texts) < 2:
            raise SfumatoError(f"{model.name or 'The model'} has one text encoder, so a second prompt has no reader.")
        if len(prompt_2) != len(prompt):
            raise SfumatoError(f"There are {len(prompt)} prompts and {len(prompt_2)} for the second text encoder.")
        texts["text_encoder_2"] = prompt_2

    def read(name: str, chunks: int) -> Tokens:
        return tokenize(model.tokenizers[tokenizer_name(name)], texts[name], weights=weights, long=long, chunks=chunks)

    tokens = {name: read(name, chunks) for name in texts}
    longest = max(each.ids.shape[1] for each in tokens.values())
    return {name: each if each.ids.shape[1] == longest else read(name, longest) for name, each in tokens.items()}


def encode_prompt(model: Model, tokens: Mapping[str, Tokens], *, clip_skip: int = 0) -> TextFeatures:
    """The text features of prompts, compiled once for each number of prompts and chunks; those of the last prompts are
    remembered.

    `hidden` [B, n L, D] goes to cross-attention; of SDXL's two encoders it holds the features side by side. `pooled`
    [B, P] comes from the first chunk, through the second encoder of SDXL. `clip_skip` is how many more of the last
    layers are left out than the model was trained with: a "clip skip" of 2 in AUTOMATIC1111's counting is 1 here.
    Raises SfumatoError for more than there are layers.
    """
    skip, normalize = READING[model.family]
    for encoder in model.text_encoders.values():
        most = len(encoder.text_model.encoder.layers) - skip
        if not 0 <= clip_skip <= most:
            raise SfumatoError(f"clip_skip={clip_skip} does not fit the text encoder, which allows 0 to {most}.")
    encoders = [model.text_encoders[name] for name in sorted(model.text_encoders)]
    texts, skip = [tokens[name] for name in sorted(tokens)], skip + clip_skip
    made = functools.partial(_encode_all, encoders, texts, skip, normalize)
    return TextFeatures(*remembered(encoders, texts, (skip, normalize), made))


@functools.partial(Kept, static_argnums=(2, 3))
def _encode_all(
    encoders: list[ClipTextEncoder], tokens: list[Tokens], skip: int, normalize: bool
) -> tuple[Float[Array, "B L D"], Float[Array, "B P"] | None]:  # fmt: skip
    """The fields of TextFeatures."""
    pairs = zip(encoders, tokens, strict=True)
    features = [
        encode(encoder, jnp.asarray(each.ids), jnp.asarray(each.weights), skip, normalize) for encoder, each in pairs
    ]
    return jnp.concatenate([each.hidden for each in features], axis=-1), features[-1].pooled


def encode(
    encoder: ClipTextEncoder, ids: Int[Array, "B n L"], weights: Float[Array, "B n L"], skip: int, normalize: bool,
) -> TextFeatures:  # fmt: skip
    """Encodes every chunk on its own and weighs its tokens: `hidden` [B, n L, D], and `pooled` [B, P] of the first.

    `skip` and `normalize` are those of ClipTextEncoder. Plain weights change nothing, bit for bit.
    """
    batch, chunks, length = ids.shape
    features = encoder(ids.reshape(-1, length), skip, normalize)
    hidden = weigh(features.hidden, weights.reshape(-1, length)).reshape(batch, chunks * length, -1)
    pooled = features.pooled
    return TextFeatures(hidden, None if pooled is None else pooled.reshape(batch, chunks, -1)[:, 0])


def weigh(hidden: Float[Array, "B L D"], weights: Float[Array, "B L"]) -> Float[Array, "B L D"]:
    """Multiplies the features of every token by its weight and restores the mean over the chunk.

    h'_i = w_i h_i mean(h) / mean(w h): the rule of AUTOMATIC1111's web UI, per prompt, in float32. Where one of the
    means is as good as 0 their ratio says nothing, and nothing is restored.
    """
    plain = hidden.astype(jnp.float32)
    weighted = plain * weights[..., None]
    before, after = (jnp.mean(h, axis=(1, 2), keepdims=True) for h in (plain, weighted))
    size = jnp.sqrt(jnp.mean(plain**2, axis=(1, 2), keepdims=True))
    sound = jnp.minimum(jnp.abs(before), jnp.abs(after)) > SMALLEST_MEAN * size
    restored = weighted * jnp.where(sound, before / jnp.where(sound, after, 1.0), 1.0)
    unweighted = (weights == 1).all(axis=1)[:, None, None]
    return jnp.where(unweighted, hidden, restored.astype(hidden.dtype))
