"""What DeepCache and token merging save, and how far their pictures are from the exact ones.

    python benchmarks/accelerations.py [--model emoji|sd15|PATH] [--steps 30] [--size 512] [--runs 5] [--dtype bfloat16]

All settings draw the same picture turn by turn in one process, with the model's own guidance. Prints medians of seconds
(text encoder and autoencoder included), the exact run's median divided by each, and the peak signal-to-noise ratio of
its picture beside the exact one. `sd15` is a model of SD 1.5's shapes with random weights, whose pictures are noise:
there only the seconds say something. On a processor give it few --steps.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import sfumato
from sfumato.bench import timed

PROMPT, SEED = "red apple, noto", 7
SETTINGS: dict[str, tuple[sfumato.Control, ...]] = {
    "exact": (),
    **{f"DeepCache({every})": (sfumato.DeepCache(every),) for every in (2, 3, 5)},
    "DeepCache(3, layers=1)": (sfumato.DeepCache(3, layers=1),),
    **{f"TokenMerging({ratio})": (sfumato.TokenMerging(ratio),) for ratio in (0.25, 0.5)},
    "DeepCache(3) and TokenMerging(0.5)": (sfumato.DeepCache(3), sfumato.TokenMerging(0.5)),
}


def load(name: str, dtype: str) -> sfumato.Model:
    """The model, in memory."""
    if name != "sd15":
        return sfumato.load(name, dtype=dtype)
    from load import make

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), dtype)
        model = sfumato.load(folder, dtype=dtype)
        jax.block_until_ready((model.unet, model.vae, list(model.text_encoders.values())))
    return model


def psnr(got: np.ndarray, want: np.ndarray) -> float:
    """In decibels, of 8-bit pictures; infinite for equal ones."""
    error = np.mean((got.astype(np.float64) - want) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf


def compare(model: sfumato.Model, steps: int, size: tuple[int, int] | None, runs: int) -> dict[str, Any]:
    """Seconds, their ratio and the error of every setting."""

    def draw(name: str) -> np.ndarray:
        controls = [sfumato.CFG.of(model), *SETTINGS[name]]
        return sfumato.generate(model, PROMPT, controls=controls, steps=steps, size=size, seed=SEED)[0].array

    drawn = {name: draw(name) for name in SETTINGS}  # compiles
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    for _ in range(runs):
        for name, each in times.items():
            each.append(timed(lambda name=name: draw(name))[1])
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        name: {
            "faster": medians["exact"] / medians[name], "seconds": medians[name], "least": min(times[name]),
            "psnr": psnr(drawn[name], drawn["exact"]),
        }
        for name in SETTINGS
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="emoji")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--size", type=int, help="in pixels; the model's own")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    size = None if args.size is None else (args.size, args.size)
    found = compare(load(args.model, args.dtype), args.steps, size, args.runs)
    print(json.dumps(vars(args) | {"settings": found}, indent=1))


if __name__ == "__main__":
    main()
