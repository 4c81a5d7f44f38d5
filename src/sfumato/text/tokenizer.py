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
import json
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import ftfy
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
        if not isinstance(text, str):
            raise SfumatoError(f"A prompt must be a string, not {text!r}.")
        return self.backend.encode(clean(text), add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | Int[np.ndarray, " L"]) -> str:
        """The text of tokens, in lower case and with a space after each word."""
        text = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text.replace(WORD_END, " ").strip()

    def words(self, text: str) -> list[tuple[str, tuple[int, ...]]]:
        """The words of a prompt, each with the positions of its tokens in the row (0 is the start token)."""
        found, ids, start, whole = [], self.encode(text), 0, self.backend.get_added_tokens_decoder()
        for stop, i in enumerate(ids, start=1):
            if i in whole or str(self.backend.id_to_token(i)).endswith(WORD_END):
                found.append((self.decode(ids[start:stop]), tuple(range(start + 1, stop + 1))))
                start = stop
        return found

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


def clean(text: str) -> str:
    """The text with broken encodings repaired and HTML entities resolved, twice, as OpenAI's CLIP does it."""
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


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
    roles = {role: _token(value) for role, value in (ROLES | {"pad_token": pad}).items()}
    vocab = {word: i for i, word in enumerate(words)}
    return _assemble(vocab, merges, roles, {}, LONGEST, "CLIP's vocabulary")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder.

    Reads tokenizer.json, or vocab.json with merges.txt; and where they are there, tokenizer_config.json,
    special_tokens_map.json and added_tokens.json. Raises FileError for a file that is missing or
    damaged, or if the files do not fit each other.
    """
    folder = Path(folder)
    try:
        vocab, merges, added = _vocabulary(folder)
        config = _json(folder / "tokenizer_config.json", {})
        if "added_tokens_decoder" in config:
            # Such a file says all: special_tokens_map.json and added_tokens.json are then left-overs.
            added = {int(i): _token(value) for i, value in config["added_tokens_decoder"].items()}
            named, older = config, {}
        else:
            named = config | _json(folder / "special_tokens_map.json", {})
            older = _json(folder / "added_tokens.json", {})
        roles = {role: _token(named.get(role) or value) for role, value in ROLES.items()}
        special = {token.content for token in roles.values()}
        for word, i in older.items():
            named_one = word in special
            added.setdefault(int(i), AddedToken(word, normalized=not named_one, special=named_one))
        known = {token.content: token for token in added.values()}
        roles = {role: known.get(token.content, token) for role, token in roles.items()}
        length = config.get("model_max_length") or LONGEST
        # Where nobody set it, the format writes a number of 31 digits.
        length = LONGEST if length > 10**6 else int(length)
        return _assemble(vocab, merges, roles, added, length, str(folder))
    except FileError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise FileError(f"{folder}: the tokenizer's files are damaged ({what}).") from None


def _vocabulary(folder: Path) -> tuple[dict[str, int], Merges, dict[int, AddedToken]]:
    """Vocabulary, merges and added tokens of a folder, before its configuration is looked at."""
    whole, vocab, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        file = _json(whole)
        model, kind = file["model"], file["model"].get("type", "BPE")
        if kind != "BPE":
            raise FileError(f"{whole} holds a {kind} tokenizer, but CLIP's has byte pairs (BPE).")
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        added = {int(value["id"]): _token(value) for value in file.get("added_tokens", ())}
        return _numbered(model["vocab"], whole), [(left, right) for left, right in pairs], added
    if not (vocab.exists() and merges.exists()):
        raise FileError(f"{folder} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt).")
    return _numbered(_json(vocab), vocab), _pairs(merges), {}


def _numbered(vocab: dict[str, Any], path: Path) -> dict[str, int]:
    """The vocabulary, checked to give each token a number of its own."""
    if not all(isinstance(i, int) for i in vocab.values()) or len({*vocab.values()}) < len(vocab):
        raise FileError(f"{path} does not give every token a number of its own.")
    return vocab


def _pairs(path: Path) -> Merges:
    """The merges of a merges.txt, one pair a line."""
    pairs = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        parts = line.split()
        if not parts or line.startswith("#version"):
            continue
        if len(parts) != 2:
            raise FileError(f"{path}: line {number} is not a pair of tokens: {line[:60]!r}.")
        pairs.append((parts[0], parts[1]))
    return pairs


def _assemble(
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


def _token(value: str | Mapping[str, Any]) -> AddedToken:
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


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} cannot be read as text ({error}).") from None


def _json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file, or `default` if there is one and no file."""
    if default is not None and not path.exists():
        return default
    try:
        value = json.loads(_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"{path} is not valid JSON ({error}).") from None
    if not isinstance(value, dict):
        raise FileError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value
