"""How good the embedded model is.

    python -m benchmarks.quality MODEL --art FOLDER [--net canny=NET] [--steps 20] [--rounds 1]
        [--only autoencoder text guidance inpainting canny grayscale regions]

MODEL is what `sfumato.load` takes, NET what `sfumato.load_controlnet` takes; an embedded model has its own. FOLDER is
one of `tools.art`, the one that the model was trained on: its training pictures are those that are searched for the
nearest neighbour, its held-out ones are what is asked for.
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
from sfumato.embedded import controlnet_for

PARTS = ("autoencoder", "text", "guidance", "inpainting")
CONTROLS = {
    "canny": ("F1 of edges", measures.same_edges),
    "grayscale": ("PSNR of grey", measures.grey_psnr),
    "regions": ("IoU of regions", measures.same_regions),
}
"""By annotator, what is compared between the picture that the control is made of and the one that is drawn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--art", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, *CONTROLS), default=(*PARTS, *CONTROLS))
    parser.add_argument("--net", nargs="+", default=[], metavar="ANNOTATOR=NET")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, help="the model's own")
    parser.add_argument("--count", type=int, default=100, help="prompts of each kind")
    parser.add_argument("--rounds", type=int, default=1, help="of seeds, for the figures of text")
    args = parser.parse_args()
    began, model = time.monotonic(), sfumato.load(args.model)
    guidance = CFG.of(model, args.guidance)
    known, heldout = read(args.art), read(args.art / HELDOUT)
    figures: dict[str, float] = {}
    if "autoencoder" in args.only:
        figures |= measures.autoencoder(model, heldout)
    space = Space(known.pictures, known.concepts)
    asked = {"seen": known.take(args.count), "held out": heldout.pairs().take(args.count)}
    how = {"steps": args.steps, "controls": [guidance]}
    if "text" in args.only:
        figures["ceiling, held out"] = measures.ceiling(asked["held out"], space)
        for kind, art in asked.items():
            figures[f"text, {kind}"] = measures.text(model, art, space, args.rounds, **how)
    if "guidance" in args.only:
        for kind, art in asked.items():
            plain = measures.text(model, art, space, args.rounds, steps=args.steps, controls=[])
            figures[f"text without guidance, {kind}"] = plain
        figures |= measures.negative(model, asked["seen"], **how)
    if "inpainting" in args.only:
        figures |= measures.inpainting(model, asked["seen"], guidance, steps=args.steps)
    nets = dict(each.split("=", 1) for each in args.net)
    for annotator, (name, compare) in CONTROLS.items():
        own = controlnet_for(args.model, annotator)
        if annotator not in args.only or not (own or annotator in nets):
            continue
        net = sfumato.load_controlnet(nets.get(annotator) or own.name)
        for scale in (1.0, 0.0):
            kind = f"{name}, held out{'' if scale else ', without the net'}"
            figures[kind] = measures.controlled(
                model, net, asked["held out"], annotator, compare, guidance, scale, steps=args.steps
            )
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}")
    print(json.dumps({"model": args.model, "art": args.art.name, "steps": args.steps, "guidance": guidance.scale,
                      "seconds": round(time.monotonic() - began), **figures}))  # fmt: skip


if __name__ == "__main__":
    main()
