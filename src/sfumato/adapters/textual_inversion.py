"""Textual Inversion (arXiv:2208.01618): new words, as vectors that a text encoder reads like those of its vocabulary.

| file                                  | tensors                                                     |
|---------------------------------------|-------------------------------------------------------------|
| diffusers                             | `<token>`: [D] or [n, D]                                    |
| AUTOMATIC1111                         | `string_to_param`: {`*`: [n, D]}, or `emb_params`: [n, D]   |
| SDXL                                  | `clip_l`: [n, 768] and `clip_g`: [n, 1280]                  |
| LoRA with tokens (cloneofsimo)        | `<token>`: [D], which the metadata calls `<embed>`          |
| LoRA with tokens (AUTOMATIC1111)      | `bundle_emb.<token>.` before what an embedding's file has   |

A file without a name for its token gives the token its own name.
"""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sfumato.adapters.live import copied
from sfumato.adapters.save_lora import write_tensors
from sfumato.controls.check import finite
from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.io.broken import plain
from sfumato.io.family import FAMILY_OF_TEXT, Family
from sfumato.io.hub import resolve
from sfumato.io.lazy import LazyTensor, TensorFile
from sfumato.io.load import tokenizer_name
from sfumato.io.recognise import recognise
from sfumato.io.tensors import open_tensors
from sfumato.model import Model
from sfumato.models.clip import ClipTextEncoder
from sfumato.text.prompt import tokenize
from sfumato.text.tokenizer import Tokenizer
from sfumato.types import Numbers, pytree, static

OLD_END = 2
"""The end-of-text token of old text encoders' configurations: not a number but "the last of the vocabulary"."""

ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
"""SDXL's text encoders by the names that embeddings' files have for them."""

NAMELESS = ("*", "emb_params", "", *ENCODERS)
"""Keys that are not a token's name."""

WEIGHTS = re.compile(r"\.(weight|bias|alpha)$")
"""Keys of the layers of a network."""

FILE_NAMES = ("learned_embeds.safetensors", "learned_embeds.bin")
"""What a folder or a hub repository calls its embedding, best first."""


@pytree
class Embedding:
    """A new word for prompts."""

    token: str = static()
    """How it is written in a prompt."""
    vectors: Mapping[str, Float[Numbers, "*n D"]]
    """By component name of the text encoder ("text_encoder", "text_encoder_2"): one vector, or several that are read
    one after another."""

    def apply(self, model: Model, strength: float = 1.0) -> Model:
        """A model like `model` whose prompts may hold the token; the one given stays as it is.

        The vectors are multiplied by `strength`; at 0 the model is the one given, which does not know the token. Where
        a model has a single text encoder, it takes a single set of vectors whatever its component name. Raises
        MismatchError for vectors of another width, too many or too few of them, and SfumatoError for a token that
        the vocabulary has already or that a prompt cannot hold.
        """
        if not isinstance(model, Model):
            raise SfumatoError(f"An embedding is applied to a model (sfumato.load), not to a {type(model).__name__}.")
        strength = finite("An embedding's strength", strength)
        encoders, tokenizers = dict(model.text_encoders), dict(model.tokenizers)
        for name, vectors in self._fitting(model).items():
            tokenizer = tokenizers[tokenizer_name(name)]
            tokenizers[tokenizer_name(name)] = _place(tokenizer, self.token, len(vectors))
            encoders[name] = _longer(encoders[name], tokenizer, vectors * np.float32(strength))
        if not strength:
            return model
        applied = (*model.adapters, f"word {self.token} ({strength:g})")
        return dc.replace(model, text_encoders=encoders, tokenizers=tokenizers, adapters=applied)

    def _fitting(self, model: Model) -> dict[str, Float[np.ndarray, "n D"]]:
        """The vectors for each text encoder of `model`. Raises MismatchError if they are of other widths or numbers."""
        strange = self.vectors.keys() - ENCODERS.values()
        if strange:
            raise SfumatoError(f"Vectors are for {' or '.join(ENCODERS.values())}, not {', '.join(sorted(strange))}.")
        ours = {name: np.atleast_2d(np.asarray(value, np.float32)) for name, value in self.vectors.items()}
        wanted = {name: encoder.config.hidden_size for name, encoder in model.text_encoders.items()}
        if len(ours) == len(wanted) == 1:
            ours = dict(zip(wanted, ours.values(), strict=True))
        elif model.family == Family.SDXL_REFINER:
            ours = {name: value for name, value in ours.items() if name in wanted}  # it goes without the first
        widths = {name: value.shape[-1] for name, value in ours.items()}
        if widths != wanted:
            raise MismatchError(
                f"The token {self.token!r} has vectors of width {_widths(widths.values())}, and "
                f"{model.name or 'the model'} needs {_widths(wanted.values(), model.family)}."
            )
        counts = [len(value) for value in ours.values()]
        if len({*counts}) > 1:
            raise MismatchError(
                f"The token {self.token!r} has {counts[0]} vectors for one text encoder and {counts[1]} for the other; "
                "it needs as many for both."
            )
        return ours


def load_embedding(file: str | Path, token: str | None = None) -> Embedding:
    """A Textual Inversion embedding from a file (.safetensors, .bin, .pt), a folder or a hub id.

    `token` is the name for prompts if it is not to be that of the file; of a file with several tokens, it is the one
    that is meant. Raises FileError for what cannot be read, is something else, or holds numbers that are not finite.
    """
    path = resolve(file, lambda names, where: [_chosen(names, where)])
    if path.is_dir():
        path /= _chosen([entry.name for entry in path.iterdir()], str(path))
    found = read_embeddings(open_tensors(path))
    if not found:
        raise FileError(f"{path} holds no vectors of a token.")
    if len(found) > 1 and token not in found:
        asked = "say with token= which is meant" if token is None else f"{token!r} is none of them"
        raise FileError(f"{path} holds the tokens {plain(', '.join(found))}; {asked}.")
    name = token if token in found else next(iter(found))
    return Embedding(token or name, {encoder: _read(path, name, tensor) for encoder, tensor in found[name].items()})


def save_embedding(embedding: Embedding, file: str | Path, *, overwrite: bool = False) -> Path:
    """Writes an embedding as .safetensors, which diffusers and `load_embedding` read, and returns the file.

    `file` ends in .safetensors or is a folder that is there, in which it becomes learned_embeds.safetensors. Raises
    SfumatoError if the file is there already, unless `overwrite`.
    """
    file = Path(file)
    file = file / FILE_NAMES[0] if file.is_dir() else file
    if file.suffix != ".safetensors":
        raise SfumatoError(f"Embeddings are written as .safetensors, and {file} is neither that nor a folder.")
    if file.exists() and not overwrite:
        raise SfumatoError(f"{file} is there already; name another file or say overwrite=True.")
    vectors = {name: np.atleast_2d(np.asarray(value, np.float32)) for name, value in embedding.vectors.items()}
    keys = {name: key if len(vectors) > 1 else embedding.token for key, name in ENCODERS.items()}
    metadata = {"format": "pt", "name": embedding.token}
    write_tensors({keys[name]: value for name, value in vectors.items()}, file, metadata)
    return file


def read_embeddings(file: TensorFile) -> dict[str, dict[str, LazyTensor]]:
    """All tokens in a file and their vectors by text encoder; also those that a LoRA carries.

    Raises FileError for a file of another kind, or vectors of another shape than [D] or [n, D].
    """
    finding = recognise(file)
    if finding.kind not in ("lora", "textual inversion", "unknown") or "is" in finding.details:
        raise FileError(f"{file.path} is {finding.details.get('is', f'a {finding.kind}')} and no embedding of a token.")
    own = file.metadata.get("name") or file.path.stem
    found: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in file.tensors.items():
        name, rest = own, key
        if key.startswith("bundle_emb."):
            name, _, rest = key.removeprefix("bundle_emb.").partition(".")
        elif finding.kind == "lora" and file.metadata.get(key) != "<embed>":
            continue
        if rest.startswith("string_to_token."):
            continue
        if len(tensor.shape) not in (1, 2) or 0 in tensor.shape or WEIGHTS.search(rest):
            raise FileError(
                f"{file.path} is no embedding of a token: it holds {plain(key)} of the shape {list(tensor.shape)}, "
                "where vectors [D] or [n, D] are expected."
            )
        # A tensor alone may be for any text encoder; only the second of SDXL has this width.
        encoder = ENCODERS.get(rest, "text_encoder_2" if tensor.shape[-1] == 1280 else "text_encoder")
        rest = rest.removeprefix("string_to_param.")
        found.setdefault(name if rest in NAMELESS else rest, {})[encoder] = tensor
    return found


def _read(path: Path, token: str, tensor: LazyTensor) -> Float[np.ndarray, "n D"]:
    vectors = np.atleast_2d(tensor.read().astype(np.float32))
    if not np.isfinite(vectors).all():
        raise FileError(f"{path} is damaged: the vectors of {plain(token)!r} hold numbers that are not finite.")
    return vectors


def _chosen(names: Collection[str], where: str) -> str:
    """Which of a folder's files holds the embedding."""
    there = [name for name in names if name.endswith((".safetensors", ".bin", ".pt")) and "/" not in name]
    found = [name for name in FILE_NAMES if name in there] or there
    if len(found) == 1 or found[:1] == [FILE_NAMES[0]]:
        return found[0]
    if not found:
        raise FileError(f"{where} holds no embedding: neither {' nor '.join(FILE_NAMES)} is there.")
    raise FileError(f"{where} holds {', '.join(sorted(found))}; name the one that is meant.")


def _place(tokenizer: Tokenizer, token: str, count: int) -> Tokenizer:
    """The tokenizer with a placeholder that prompts can hold."""
    room = tokenizer.max_length - 2
    if count > room:
        raise MismatchError(f"The token {token!r} has {count} vectors, and a chunk of a prompt has room for {room}.")
    new = tokenizer.place(token, count)
    tokens = tokenize(new, [token])
    expected = list(range(tokenizer.size, new.size))
    if tokens.ids[0, 0, 1 : count + 1].tolist() != expected or (tokens.weights != 1).any():
        raise SfumatoError(
            f"The token {token!r} holds signs that mean something else in a prompt; choose another name with token=."
        )
    return new


def _longer(encoder: ClipTextEncoder, tokenizer: Tokenizer, vectors: Float[np.ndarray, "n D"]) -> ClipTextEncoder:
    """The text encoder with `vectors` after the rows of `tokenizer`'s vocabulary; all other arrays are the same."""
    table = encoder.text_model.embeddings.token_embedding.embedding
    if len(table[...]) < tokenizer.size:
        raise MismatchError(
            f"The tokenizer has {tokenizer.size} tokens and the text encoder knows {len(table[...])}; they are not of "
            "one model."
        )
    new, rows = copied(encoder), jnp.asarray(vectors, table.dtype)
    count = tokenizer.size + len(rows)
    own = new.text_model.embeddings.token_embedding
    own.embedding.set_value(jnp.concatenate([table[: tokenizer.size], rows]))
    own.num_embeddings = count
    # The old way to name the end would find the new tokens, whose numbers are the highest.
    end = tokenizer.eos if encoder.config.eos_token_id == OLD_END else encoder.config.eos_token_id
    new.config = dc.replace(encoder.config, vocab_size=count, eos_token_id=end)
    return new


def _widths(widths: Collection[int], family: Family | None = None) -> str:
    """Widths of text features with the family that has them."""
    if family is None:
        known = {FAMILY_OF_TEXT.get(width) for width in widths}
        family = Family.SDXL if {*widths} == {768, 1280} else known.pop() if len(known) == 1 else None
    numbers = " and ".join(map(str, sorted(widths))) or "none"
    return numbers + (f" ({family.full_name})" if family else "")
