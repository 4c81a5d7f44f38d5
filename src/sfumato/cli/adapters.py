"""What `--lora` and `--embedding` say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from sfumato.errors import SfumatoError

if TYPE_CHECKING:
    from sfumato.model import Model

LoraOption = typer.Option(
    "--lora", metavar="FILE[:STRENGTH]",
    help="Apply a LoRA, a path or hub id, with this strength (1); may be repeated.",
)  # fmt: skip
EmbeddingOption = typer.Option(
    "--embedding", metavar="FILE[=WORD]",
    help="Learn a word from a Textual Inversion file: its own, or WORD; may be repeated.",
)  # fmt: skip


def parse_lora(text: str) -> tuple[str, float]:
    """The file and the strength. Raises SfumatoError for a strength that is no finite number."""
    from sfumato.controls.check import finite

    file, sign, strength = text.rpartition(":")
    # What follows a colon in a path (C:\\loras) has separators or an ending, which no number has.
    if not sign or any(mark in strength for mark in "/\\") or strength.endswith((".safetensors", ".bin", ".pt")):
        return text, 1.0
    if not file:
        raise SfumatoError(f"--lora takes FILE[:STRENGTH], such as style.safetensors:0.8, not {text!r}.")
    return file, finite(f"The strength of --lora {file}", strength)


def adapted(model: Model, loras: Sequence[tuple[str, float]], embeddings: Sequence[str]) -> Model:
    """The model with LoRAs, one after another, and with new words. Raises SfumatoError for what does not fit."""
    import sfumato

    for file, strength in loras:
        model = sfumato.load_lora(file, model).apply(model, strength)
    for text in embeddings:
        file, _, word = text.partition("=")
        model = sfumato.load_embedding(file, word or None).apply(model)
    return model
