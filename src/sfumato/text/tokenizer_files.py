"""The tokenizer of a checkpoint's folder, out of all the kinds of files that such folders hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from sfumato.errors import FileError
from sfumato.text.tokenizer import LONGEST, ROLES, Merges, Tokenizer, added_token, assemble


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
            added = {int(i): added_token(value) for i, value in config["added_tokens_decoder"].items()}
            named, older = config, {}
        else:
            named = config | _json(folder / "special_tokens_map.json", {})
            older = _json(folder / "added_tokens.json", {})
        roles = {role: added_token(named.get(role) or value) for role, value in ROLES.items()}
        special = {token.content for token in roles.values()}
        for word, i in older.items():
            named_one = word in special
            added.setdefault(int(i), AddedToken(word, normalized=not named_one, special=named_one))
        known = {token.content: token for token in added.values()}
        roles = {role: known.get(token.content, token) for role, token in roles.items()}
        length = config.get("model_max_length") or LONGEST
        # Where nobody set it, the format writes a number of 31 digits.
        length = LONGEST if length > 10**6 else int(length)
        return assemble(vocab, merges, roles, added, length, str(folder))
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
        added = {int(value["id"]): added_token(value) for value in file.get("added_tokens", ())}
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
