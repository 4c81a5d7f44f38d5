"""Seconds until the program of a whole run is ready, at SD 1.5's size, without weights.

    python benchmarks/compile_time.py [--dtype bfloat16] [--runs 3] [--controlnet]

Each run is a process of its own that traces, lowers and compiles the loop of 20 steps with guidance: with an empty
cache of programs, and then with what that left behind, where tracing is reading. Prints the first, and medians of the
others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile

PROGRAM = """
import json, sys, time
import jax, jax.numpy as jnp
from sfumato.cache import enable_cache
from sfumato.controls import CFG, ControlNet
from sfumato.models import controlnet
from sfumato.models.config import ControlNetConfig, UNetConfig
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.run import columns
from sfumato.sample import AWAKE, _whole
from sfumato.samplers import sampler
from sfumato.schedule import Schedule
from sfumato.types import Conditioning, Window

dtype, controlled = sys.argv[1:]
enable_cache()

def typed(network):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), network)

unet = typed(abstract(UNet, UNetConfig(cross_attention_dim=768, sample_size=64)))
controls = [CFG(jnp.float32(7.5), jnp.float32(0.0))]
if controlled == "yes":
    net = typed(abstract(controlnet.ControlNet, ControlNetConfig(cross_attention_dim=768)))
    picture = jax.ShapeDtypeStruct((1, 512, 512, 3), "float32")
    controls.append(ControlNet(net, picture, jnp.float32(1.0), Window()))
schedule = Schedule()
chosen = sampler("dpm++ 2m", schedule)
steps = columns(chosen.table(schedule, 20), None)
text = Conditioning(jax.ShapeDtypeStruct((1, 77, 768), "float32"))
x = jax.ShapeDtypeStruct((1, 64, 64, 4), "float32")
began = time.perf_counter()
lowered = _whole.lower(
    unet, chosen, steps, tuple(controls), x, {"cond": text, "uncond": text}, "epsilon", None, AWAKE
)
traced = time.perf_counter()
lowered.compile()
print(json.dumps({"trace and lower": traced - began, "compile": time.perf_counter() - traced}))
"""


def process(cache: str, dtype: str, controlled: bool) -> dict[str, float]:
    """Seconds of each part, in a new process."""
    words = [sys.executable, "-c", PROGRAM, dtype, "yes" if controlled else "no"]
    environment = os.environ | {"SFUMATO_CACHE": cache}
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    return found | {"together": sum(found.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--controlnet", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold = process(cache, args.dtype, args.controlnet)
        warm = [process(cache, args.dtype, args.controlnet) for _ in range(args.runs)]
    medians = {name: statistics.median(each[name] for each in warm) for name in cold}
    for name in cold:
        print(f"{name:16} empty cache {cold[name]:6.2f} s, from the cache {medians[name]:6.2f} s")
    print(json.dumps({**vars(args), "cores": os.cpu_count(), "empty": cold, "cached": medians}))


if __name__ == "__main__":
    main()
