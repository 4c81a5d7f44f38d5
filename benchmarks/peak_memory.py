"""The peak of memory of a process that draws a picture with a model of Stable Diffusion 1.5's size (random weights).

    python benchmarks/peak_memory.py [--dtype bfloat16] [--size 512] [--steps 2]

sfumato and diffusers on torch, each in a process of its own that imports what that side needs and nothing of the other,
as its user's process does, and loads the same folder. Prints what each process takes once its libraries are imported,
with the model, after the first picture, and at most during the second; and the ratio of the latter. sfumato is measured
twice: in the first process, which compiles, and in a later one, which finds the programs in the cache. Linux.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load import make

PROMPT = "red apple"


def memory(what: str = "VmRSS") -> int:
    """Bytes that this process has now (VmRSS) or had at most (VmHWM), without what could be given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def ours(args: argparse.Namespace, found: dict[str, int]) -> Callable[[], Any]:
    import jax

    import sfumato

    jax.devices()
    found["imported"] = memory()
    model = sfumato.load(args.folder, dtype=args.dtype)
    jax.block_until_ready((model.unet, model.vae))
    return lambda: sfumato.generate(model, PROMPT, steps=args.steps, size=(args.size, args.size), sampler="ddim")


def theirs(args: argparse.Namespace, found: dict[str, int]) -> Callable[[], Any]:
    import diffusers
    import torch

    found["imported"] = memory()
    # Without mapping files into memory: what has been mapped would count even where channels last is a copy of it.
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        args.folder, torch_dtype=getattr(torch, args.dtype), safety_checker=None, disable_mmap=True
    )
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return lambda: pipeline(PROMPT, num_inference_steps=args.steps, height=args.size, width=args.size)


SIDES = {"ours": ours, "theirs": theirs}


def peak(side: str, args: argparse.Namespace) -> dict[str, int]:
    """Bytes of this process, with the libraries and the model of one side."""
    found: dict[str, int] = {}
    call = SIDES[side](args, found)
    found["loaded"] = memory()
    call()
    found["once"] = memory()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    call()
    return found | {"peak": memory("VmHWM")}


def measured(side: str, cache: str) -> dict[str, int]:
    """`peak`, in a process of its own: this command again."""
    words, settings = [sys.executable, *sys.argv, "--side", side], {**os.environ, "SFUMATO_CACHE": cache}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=settings)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--folder", help="a model on disk in place of one with random weights")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(peak(args.side, args)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.folder is None:
            maker = multiprocessing.get_context("spawn").Process(target=make, args=(Path(folder) / "model", args.dtype))
            maker.start()
            maker.join()
            sys.argv += ["--folder", str(Path(folder) / "model")]
        cache = os.environ.get("SFUMATO_CACHE", str(Path(folder) / "cache"))
        found = {"first process": measured("ours", cache), "later process": measured("ours", cache)}
        torch = measured("theirs", cache)
    for name, each in {**found, "torch": torch}.items():
        sizes = ", ".join(f"{part} {value / 2**20:.0f} MB" for part, value in each.items())
        print(f"{name:14} {each['peak'] / torch['peak']:.2f} x torch's peak: {sizes}", flush=True)


if __name__ == "__main__":
    main()
