"""How good the embedded model is.

    python -m benchmarks.quality MODEL --art FOLDER [--only autoencoder text guidance] [--steps 20]

MODEL is what `sfumato.load` takes. FOLDER is one of `tools.art`, the one that the model was trained on: its training
pictures are those that are searched for the nearest neighbour, its held-out ones are what is asked for.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sfumato
from benchmarks.quality import measures
from benchmarks.quality.art import HELDOUT, read
from benchmarks.quality.features import Space
from sfumato import CFG

PARTS = ("autoencoder", "text", "guidance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    args = parser.parse_args()
    began, model = time.monotonic(), sfumato.load(args.model)
    known, heldout = read(args.art), read(args.art / HELDOUT)
    figures: dict[str, float] = {}
    if "autoencoder" in args.only:
        figures |= measures.autoencoder(model, heldout)
    space = Space(known.pictures, known.concepts)
    asked = {"seen": known.take(args.count), "held out": heldout.pairs().take(args.count)}
    how = {"steps": args.steps, "controls": [CFG(args.guidance)]}
    if "text" in args.only:
        figures["ceiling, held out"] = measures.ceiling(asked["held out"], space)
        figures |= {f"text, {kind}": measures.text(model, art, space, **how) for kind, art in asked.items()}
    if "guidance" in args.only:
        for kind, art in asked.items():
            figures[f"text without guidance, {kind}"] = measures.text(model, art, space, steps=args.steps, controls=[])
        figures["text, seen, also negative"] = measures.negative(model, asked["seen"], space, **how)
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}")
    print(json.dumps({"model": args.model, "art": args.art.name, "steps": args.steps, "guidance": args.guidance,
                      "seconds": round(time.monotonic() - began), **figures}))  # fmt: skip


if __name__ == "__main__":
    main()
