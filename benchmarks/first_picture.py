"""How long one waits for a picture of the model that comes with sfumato.

    python benchmarks/first_picture.py [--control sketch=docs/gallery/sketch-cat.jpg] [--runs 5]

Runs `sfumato generate` in processes of their own: once with an empty cache of compiled programs, as on the first day,
and then with what that left behind. Then it draws pictures, one after another, in a process that goes on. Prints
seconds of the wall clock: the first, and medians of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROMPT = "a cat face, noto style"


def process(words: Sequence[str], cache: Path) -> float:
    """Seconds that a command takes as a process of its own."""
    began = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, env=os.environ | {"SFUMATO_CACHE": str(cache)},
                   stdout=subprocess.DEVNULL)  # fmt: skip
    return time.perf_counter() - began


def further(control: str | None, runs: int) -> float:
    """Median of the seconds of a picture at default settings in this process, after the first."""
    import jax
    from PIL import Image

    import sfumato
    from sfumato.embedded import controlnet_for

    model = sfumato.load("emoji")
    controls = None
    if control:
        annotator, _, path = control.partition("=")
        net = sfumato.load_controlnet(controlnet_for("emoji", annotator).name)
        picture = sfumato.annotate(annotator, Image.open(path).convert("RGB").resize((128, 128)))
        controls = [sfumato.CFG.of(model), sfumato.ControlNet(net, picture)]
    times = []
    for seed in range(runs + 1):
        began = time.perf_counter()
        jax.block_until_ready(sfumato.generate(model, PROMPT, seed=seed, controls=controls)[0].array)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", metavar="ANNOTATOR=PICTURE")
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = ["-m", "sfumato", "generate", PROMPT, "-o", str(place / "a.png"), "--quiet"]
        words += ["--control", args.control] if args.control else []
        figures = {"empty cache": process(words, place / "cache")}
        figures["warm cache"] = statistics.median(process(words, place / "cache") for _ in range(args.runs))
    figures["one more picture"] = further(args.control, args.runs)
    for name, seconds in figures.items():
        print(f"{name:20} {seconds:6.2f} s")
    print(json.dumps({"control": args.control, "cores": os.cpu_count(), "runs": args.runs, **figures}))


if __name__ == "__main__":
    main()
