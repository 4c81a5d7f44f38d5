"""Pictures a second on a GPU in bfloat16, sfumato beside diffusers on torch, turn by turn in one process.

    python benchmarks/on_gpu.py sd1 [--counts 1 8] [--steps 50] [--runs 5] [--compile max-autotune]
    python benchmarks/on_gpu.py sdxl --steps 30

From the prompt to the picture, at 512 x 512 for SD 1.5's shapes and 1024 x 1024 for SDXL's, with random weights and
guidance. torch runs in channels_last, once as it is and with --compile also compiled, UNet and decoder; the better of
the two counts. Prints medians, the ratio sfumato / torch, and which share of the card's rate for products of bfloat16,
measured in the same process, sfumato's operations are. With --ours torch draws nothing; --profile also prints the
kernels of a run of sfumato that take the most time.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")  # the rest is torch's

import jax
import jax.numpy as jnp
from against_torch import SD15, SDXL, VAE, compare, drawing, pipelines
from load import make

import sfumato
from sfumato.bench import timed

SIZES, UNETS = {"sd1": 512, "sdxl": 1024}, {"sd1": SD15, "sdxl": SDXL}
EDGE = 8192
"""Of the matrices by which the card's rate is measured."""


def rate() -> float:
    """Operations a second of a product of two large matrices of bfloat16, a multiplication and an addition counted
    each."""
    left, right = jax.random.normal(jax.random.key(0), (2, EDGE, EDGE), jnp.bfloat16)

    @jax.jit
    def product(left: Any, right: Any) -> Any:
        return left @ right

    timed(lambda: product(left, right))
    return 2 * EDGE**3 / statistics.median(timed(lambda: product(left, right))[1] for _ in range(20))


def operations(family: str, count: int, steps: int, size: int) -> float:
    """Of products and convolutions in the UNet's evaluations, two rows a picture, and in the decoder, counted by torch
    while it computes on shapes alone."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    config, side, rows = UNETS[family], size // 8, 2
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as step:
        added = {"text_embeds": torch.zeros(rows, 1280), "time_ids": torch.zeros(rows, 6)}
        context = torch.zeros(rows, 77, config["cross_attention_dim"])
        UNet2DConditionModel(**config)(torch.zeros(rows, 4, side, side), 500, context, added_cond_kwargs=added)
    with torch.device("meta"), torch.inference_mode(), FlopCounterMode(display=False) as decoded:
        AutoencoderKL(**VAE).decode(torch.zeros(1, 4, side, side))
    return count * (steps * step.get_total_flops() + decoded.get_total_flops())


def torch_pipeline(folder: str) -> Any:
    """diffusers', on the GPU."""
    import diffusers
    import torch

    torch.backends.cudnn.benchmark = True
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16).to("cuda")
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return pipeline


def alone(model: Any, count: int, steps: int, size: int, runs: int, profile: bool) -> dict[str, Any]:
    """sfumato's part of `against_torch.compare`."""
    draw = drawing(model, steps, size, 4, count)[1]
    began = timed(draw)[1]
    times = [timed(draw)[1] for _ in range(runs)]
    if profile:
        print(kernels(draw))
    return {"ours, s": statistics.median(times), "spread": {"ours": [min(times), max(times)]}, "first": {"ours": began}}


def kernels(call: Any, most: int = 40) -> str:
    """The kernels of a call, with the time of all that have a name, how many they are, and that of one."""
    times: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            call()
        (path,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                if "GPU" in plane.name and line.name.startswith("Stream"):
                    for event in line.events:
                        times[event.name[:90]] += event.duration_ns
                        counts[event.name[:90]] += 1
    lines = [f"{sum(times.values()) / 1e6:9.2f} ms in {counts.total()} kernels"]
    for name, time in times.most_common(most):
        lines.append(f"{time / 1e6:9.2f} ms {counts[name]:7} x {time / counts[name] / 1e3:8.1f} us  {name}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=SIZES)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 8], help="pictures at once")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--compile", help="torch.compile, too, in this mode")
    parser.add_argument("--ours", action="store_true", help="sfumato alone")
    parser.add_argument("--profile", action="store_true", help="with --ours: the kernels that take the most time")
    args = parser.parse_args()
    args.dtype = args.torch_dtype = "bfloat16"
    size, fastest = SIZES[args.family], rate()
    print(f"{jax.devices()[0].device_kind}: products of {EDGE} x {EDGE} at {fastest / 1e12:.0f} TFLOP/s", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), "bfloat16", args.family)
        model = sfumato.load(folder, dtype="bfloat16")
        jax.block_until_ready((model.unet, model.vae))
        pipeline = None if args.ours else torch_pipeline(folder)
    for count in args.counts:
        if pipeline is None:
            found = alone(model, count, args.steps, size, args.runs, args.profile)
        else:
            found = compare(pipelines(pipeline, model, args, args.steps, size, 4, count), args.runs)
        share = operations(args.family, count, args.steps, size) / found["ours, s"] / fastest
        beside = "" if args.ours else f"{found['ratio']:.2f} x torch; "
        print(f"{args.family}, {count} at once, {args.steps} steps: {beside}{found['ours, s']:.2f} s, "
              f"{count / found['ours, s']:.2f} pictures/s, {share:.0%} of the rate")  # fmt: skip
        print(json.dumps({**vars(args), "count": count, "share": share, **found}), flush=True)


if __name__ == "__main__":
    main()
