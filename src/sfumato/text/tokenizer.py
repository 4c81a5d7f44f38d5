"""CLIP's byte-pair tokenizer (arXiv:2103.00020, section 2.4), on the tokenizers library.

A prompt is cleaned as OpenAI does it (broken encodings repaired, HTML entities resolved), then split and
merged as Hugging Face's CLIPTokenizer does it, so that a checkpoint's tokenizer files mean here what they mean
there. One consequence: SD 2.x and SDXL's second encoder pad with "!" (token 0), and a "!" in a prompt is then
that token too, where OpenCLIP reads a mark (256): https://github.com/huggingface/diffusers/issues/4153.
"""

from __future__ import annotations

import dataclasses as dc
import functools
import gzip
import html
import itertools
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int, Int32
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from sfumato.errors import FileError, SfumatoError

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"

PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
"""What merges never cross: special tokens, English endings, letters, single digits, runs of other signs."""

ROLES = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
"""The named tokens of a tokenizer's files, with their values where the files say nothing. If two of them share a
text, the later one's flags hold."""

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
"""How a token that is found before the text is split is found, by the names of the files."""

LONGEST = 77
"""Tokens in a row, start and end included, where a tokenizer's files say nothing."""

Merges = list[tuple[str, str]]


class TruncationWarning(UserWarning):
    """A prompt was too long and its end was cut off."""


@dc.dataclass(frozen=True)
class Word:
    """A word of a prompt, or a run of other signs, with its tokens."""

    text: str
    """As it stands in the prompt."""
    ids: tuple[int, ...]
    placeholder: bool = False
    """Whether it is a token that was added to the vocabulary. All of its tokens are read together or not at all."""


@dc.dataclass(frozen=True)
class Tokenizer:
    """Turns prompts into rows of token ids."""

    backend: tokenizers.Tokenizer = dc.field(repr=False)
    bos: int
    """The token that starts a row."""
    eos: int
    """The token that ends the prompt."""
    pad: int
    """The token that fills the row after the prompt's end."""
    max_length: int = LONGEST
    """Tokens in a row."""

    def __call__(self, texts: Sequence[str]) -> Int32[np.ndarray, "B L"]:
        """One row of `max_length` tokens for each prompt: start, prompt, end, padding.

        Warns with TruncationWarning, which quotes what was cut off, of a prompt that does not fit. Raises
        SfumatoError for anything but a sequence of strings.
        """
        if isinstance(texts, str):
            raise SfumatoError("The tokenizer takes a list of prompts, not a single string.")
        rows, room = np.full((len(texts), self.max_length), self.pad, np.int32), self.max_length - 2
        for row, text in zip(rows, texts, strict=True):
            ids = self.encode(text)
            if len(ids) > room:
                lost = " ".join(word for word, positions in self.words(text) if positions[-1] > room)
                message = f"The prompt has {len(ids)} tokens and only {room} are read; cut off was: {lost}"
                warnings.warn(message, TruncationWarning, stacklevel=2)
            ids = [self.bos, *ids[:room], self.eos]
            row[: len(ids)] = ids
        return rows

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt, however long, without start and end. Raises SfumatoError for no string."""
        return [i for word in self.split(text) for i in word.ids]

    def split(self, text: str) -> list[Word]:
        """The words of a prompt, however long, without start and end. Raises SfumatoError for no string."""
        if not isinstance(text, str):
            raise SfumatoError(f"A prompt must be a string, not {text!r}.")
        text = clean(text)
        found = self.backend.encode(text, add_special_tokens=False)
        words: list[Word] = []
        # The word that is being put together: its tokens, where it lies in the text, whether it could end here.
        ids: list[int] = []
        first, last, whole = 0, 0, True
        for i, token, (start, stop) in zip(found.ids, found.tokens, found.offsets, strict=True):
            added = self.added.get(i)
            if ids and (added or (whole and not _joined(text, last, start))):
                words.append(Word(text[first:last], tuple(ids)))
                ids = []
            if added:
                words.append(Word(text[start:stop], added, placeholder=True))
                continue
            if not ids:
                first = start
            ids.append(i)
            last, whole = stop, token.endswith(WORD_END)
        return [*words, Word(text[first:last], tuple(ids))] if ids else words

    @functools.cached_property
    def added(self) -> Mapping[int, tuple[int, ...]]:
        """The tokens that are found before the text is split, and what each is read as.

        A token that stands for several vectors is written once and read as itself, then as the tokens of its name
        with "_1", "_2" and so on: so does diffusers keep them.
        """
        names = {i: token.content.lower() for i, token in self.backend.get_added_tokens_decoder().items()}
        numbers = {name: i for i, name in names.items()}

        def further(name: str) -> Iterator[int]:
            ids = (numbers.get(f"{name}_{number}", -1) for number in itertools.count(1))
            return itertools.takewhile(lambda i: i >= 0, ids)

        return {i: (i, *further(name)) for i, name in names.items()}

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " L"]) -> str:
        """The text of tokens, in lower case and with a space after each word."""
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()

    def words(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a prompt, each with the positions of its tokens in the row (0 is the start token)."""
        words = self.split(text)
        stops = itertools.accumulate((len(word.ids) for word in words), initial=1)
        return [(word.text, tuple(range(at, at + len(word.ids)))) for word, at in zip(words, stops, strict=False)]

    @property
    def size(self) -> int:
        """How many tokens there are, added ones included; new ones are numbered from here."""
        return self.backend.get_vocab_size()

    def place(self, name: str, count: int = 1) -> Tokenizer:
        """A tokenizer in which `name` is a placeholder, read as `count` new tokens; this one stays as it is.

        It is found in any case and beside any sign, but one that begins or ends with a letter or digit only where no
        other follows there. Raises SfumatoError for a name that means something already, or that cannot be found.
        """
        length = len(self.encode(name))
        if not length:
            raise SfumatoError(f"A token cannot be called {name!r}; choose a name with token=, such as '<my-style>'.")
        names = [name, *(f"{name}_{number}" for number in range(1, count))]
        placed = {token.content.lower() for token in self.backend.get_added_tokens_decoder().values()}
        hint = f"choose another name with token=, such as '<my-{name.strip('<>')}>'"
        if any(each.lower() in placed for each in names):
            raise SfumatoError(f"The token {name!r} is in the model's vocabulary already as a placeholder; {hint}.")
        if length == 1 or any(self.backend.token_to_id(each) is not None for each in names):
            raise SfumatoError(f"The token {name!r} is a word of the model's vocabulary already; {hint}.")
        backend = tokenizers.Tokenizer.from_str(self.backend.to_str())
        whole = name[:1].isalnum() or name[-1:].isalnum()
        backend.add_tokens([AddedToken(each, normalized=True, special=False, single_word=whole) for each in names])
        new, ids = dc.replace(self, backend=backend), list(range(self.size, self.size + count))
        if any(new.added[i] != read for i, read in self.added.items()) or len(new.added[ids[0]]) != count:
            raise SfumatoError(f"The token {name!r} would be taken for a part of another placeholder; {hint}.")
        if new.encode(name) != ids:
            raise SfumatoError(f"The token {name!r} would not be found in a prompt, whose text is cleaned; {hint}.")
        return new

    def save(self, folder: str | Path) -> None:
        """Writes the files of a diffusers checkpoint's tokenizer folder, which is made if need be."""
        folder, model = Path(folder), json.loads(self.backend.to_str())["model"]
        ids = {"bos_token": self.bos, "eos_token": self.eos, "pad_token": self.pad}
        roles = {role: self.backend.id_to_token(i) for role, i in ids.items()}
        roles["unk_token"] = model["unk_token"]
        added = {
            i: {"content": token.content} | {flag: getattr(token, flag) for flag in FLAGS}
            for i, token in self.backend.get_added_tokens_decoder().items()
        }
        config = roles | {
            "tokenizer_class": "CLIPTokenizer", "model_max_length": self.max_length, "do_lower_case": True,
            "add_prefix_space": False, "errors": "replace", "added_tokens_decoder": added,
        }  # fmt: skip
        files = {
            "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
            "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]),
            "tokenizer_config.json": json.dumps(config, indent=2),
            "special_tokens_map.json": json.dumps(roles, indent=2),
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")


def _joined(text: str, last: int, start: int) -> bool:
    """Whether letters or digits that end at `last` and begin at `start` are of one word, as in "sd15"."""
    return start < last or (start == last and text[last - 1].isalnum() and text[start].isalnum())


def clean(text: str) -> str:
    """The text with broken encodings repaired and HTML entities resolved, twice, as OpenAI's CLIP does it."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # otherwise there is nothing to repair
        import ftfy  # takes as long to import as a step of a small model

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return text.strip()


@functools.cache
def clip_tokenizer(pad: str = END) -> Tokenizer:
    """The tokenizer of OpenAI's own vocabulary, for checkpoints that carry none.

    `pad` is "<|endoftext|>" for SD 1.x and SDXL's first encoder, "!" for SD 2.x and SDXL's second.
    """
    packed = resources.files("sfumato.text").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")
    # The file goes on, but CLIP has 2 * 256 tokens for bytes, 48894 that merge others, and two special ones.
    merges = [(left, right) for left, right in (line.split(" ") for line in lines[1 : 1 + 48894])]
    signs = _byte_signs()
    merged = [left + right for left, right in merges]
    words = [*signs, *(sign + WORD_END for sign in signs), *merged, START, END]
    roles = {role: added_token(value) for role, value in (ROLES | {"pad_token": pad}).items()}
    vocab = {word: i for i, word in enumerate(words)}
    return assemble(vocab, merges, roles, {}, LONGEST, "CLIP's vocabulary")


def assemble(
    vocab: dict[str, int], merges: Merges, roles: Mapping[str, AddedToken], added: Mapping[int, AddedToken],
    max_length: int, where: str,
) -> Tokenizer:  # fmt: skip
    """The tokenizer of a vocabulary; `where` names it in messages."""
    if max_length < 3:
        raise FileError(f"{where}: model_max_length={max_length} leaves no room for a prompt.")
    try:
        unknown = roles["unk_token"].content
        model = models.BPE(vocab=vocab, merges=merges, unk_token=unknown, end_of_word_suffix=WORD_END)
    except Exception as error:  # the library raises no narrower type
        raise FileError(f"{where}: the vocabulary and its merges do not fit each other ({error}).") from None
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])  # fmt: skip
    backend.decoder = decoders.ByteLevel()
    for i, token in sorted(added.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise FileError(f"{where}: the added token {token.content!r} cannot have the number {i}.")
    known, ids = {token.content for token in added.values()}, {}
    for role, token in roles.items():
        ids[role] = backend.token_to_id(token.content)
        if ids[role] is None:
            raise FileError(f"{where}: the {role} {token.content!r} is not in the vocabulary.")
        if token.content not in known:
            backend.add_tokens([token])
    return Tokenizer(backend, ids["bos_token"], ids["eos_token"], ids["pad_token"], max_length)


def added_token(value: str | Mapping[str, Any]) -> AddedToken:
    """A token that is found before the text is split, from its form in the files."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    flags = {flag: bool(value[flag]) for flag in FLAGS if flag in value}
    return AddedToken(value["content"], **({"special": True} | flags))


def _byte_signs() -> list[str]:
    """A sign for each of the 256 bytes, in the vocabulary's order (GPT-2's): printable Latin-1 stands for
    itself, every other byte for one of the characters from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    return [chr(code) for code in [*printable, *range(256, 512 - len(printable))]]
