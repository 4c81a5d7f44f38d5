"""Puts what was trained into the package, in half precision.

    python -m tools.embedded.pack RUNS [--only PIECE ...]

RUNS is the folder of `python -m tools.embedded`. A piece replaces the one of its name in the package. All of them
together may take 64 MB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open

import sfumato
from sfumato.adapters.save_lora import write_tensors
from sfumato.embedded import DEFAULT, PIECES, Piece

LIMIT = 64_000_000
"""Bytes of all pieces together."""


def stage(piece: Piece) -> str:
    """The stage that a piece comes from: emoji-lines from "lines"."""
    return "base" if piece.name == DEFAULT else piece.name.removeprefix(f"{DEFAULT}-")


def pack(piece: Piece, final: Path) -> None:
    """Writes a piece out of what a run has exported into `final`."""
    if piece.kind in ("model", "controlnet"):
        load = sfumato.load if piece.kind == "model" else sfumato.load_controlnet
        sfumato.save(load(final, dtype="float16"), piece.path, overwrite=True)
        return
    name = {"lora": "lora.safetensors", "embedding": "learned_embeds.safetensors"}[piece.kind]
    piece.path.parent.mkdir(parents=True, exist_ok=True)
    with safe_open(final / name, "np") as file:
        tensors, metadata = {key: file.get_tensor(key).astype(np.float16) for key in file.keys()}, file.metadata()  # noqa: SIM118
    write_tensors(tensors, piece.path, metadata or {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", nargs="+", choices=[piece.name for piece in PIECES], metavar="PIECE")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    for piece in PIECES:
        if not args.only or piece.name in args.only:
            pack(piece, args.runs / stage(piece) / "final")
            print(f"{piece.name:20} {piece.size / 1e6:6.2f} MB")
    total = sum(piece.size for piece in PIECES)
    print(f"{'all':20} {total / 1e6:6.2f} MB")
    if total > LIMIT:
        raise SystemExit(f"That is more than the {LIMIT / 1e6:.0f} MB that the package may hold.")


if __name__ == "__main__":
    main()
