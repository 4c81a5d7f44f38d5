"""Loading an SD 1.5-size folder in bfloat16, against just reading its files; and the peak of memory.

    python benchmarks/load.py [--stored float32] [--runs 5]

Makes the folder with random weights in a temporary place, then reads and loads it in turn, each in a process of its
own, and prints medians, the ratio, and the peak resident memory as a multiple of the loaded weights. The files are in
the page cache, which is the hard case: from a disk, reading takes longer and loading hardly more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

READ = """
import json, sys, time
from pathlib import Path
files = list(Path(sys.argv[1]).rglob("*.safetensors"))
start = time.perf_counter()
for file in files:
    file.read_bytes()
print(json.dumps({"seconds": time.perf_counter() - start}))
"""

LOAD = """
import json, resource, sys, time
import jax
import sfumato
jax.devices()
sfumato.load
start = time.perf_counter()
model = sfumato.load(sys.argv[1], dtype="bfloat16")
nets = [model.unet, model.vae, *model.text_encoders.values()]
jax.block_until_ready(nets)
seconds = time.perf_counter() - start
weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nets))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": seconds, "weights": weights, "peak": peak}))
"""


def make(folder: Path, dtype: str, family: str = "sd1") -> None:
    """Saves a model with the shapes of SD 1.5, or of the family `family`, and random weights."""
    import dataclasses as dc

    import numpy as np

    from sfumato.adapters.published import TEXT_ENCODERS, UNETS
    from sfumato.io.defaults import SAMPLER, SCHEDULER
    from sfumato.io.family import Family
    from sfumato.io.fill import fill, slots
    from sfumato.io.save import save
    from sfumato.io.tensors import LazyTensor
    from sfumato.model import Model
    from sfumato.models.clip import ClipTextEncoder
    from sfumato.models.layers import abstract
    from sfumato.models.unet import UNet
    from sfumato.models.vae import AutoencoderKL, VAEConfig
    from sfumato.schedule import Schedule
    from sfumato.text.tokenizer import clip_tokenizer

    kind = Family(family)
    drawn = np.random.default_rng(0).standard_normal(2**22, np.float32)

    def random(network):
        def draw(key, shape):  # so that what goes in comes out about as large
            if len(shape) > 1:
                return lambda: np.resize(drawn, shape) * np.float32(np.prod(shape[1:]) ** -0.5)
            return lambda: np.full(shape, key.endswith("weight"), np.float32)

        shapes = {slot.key: slot.stored for slot in slots(network).values()}
        tensors = {key: LazyTensor(shape, np.dtype("float32"), draw(key, shape)) for key, shape in shapes.items()}
        return fill(network, tensors, dtype=dtype)

    vae = VAEConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    pads = {"text_encoder": "<|endoftext|>", "text_encoder_2": "!"}
    model = Model(
        random(abstract(UNet, dc.replace(UNETS[kind], sample_size=128 if kind == Family.SDXL else 64))),
        random(abstract(AutoencoderKL, vae)),
        {name: random(abstract(ClipTextEncoder, config)) for name, config in TEXT_ENCODERS[kind].items()},
        {name.replace("text_encoder", "tokenizer"): clip_tokenizer(pads[name]) for name in TEXT_ENCODERS[kind]},
        Schedule.from_config({**SCHEDULER, **SAMPLER[kind]}), kind,
    )  # fmt: skip
    save(model, folder)


def child(program: str, folder: Path) -> dict:
    out = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stored", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        # In a process of its own: a child's peak of memory begins with that of the process that started it.
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, args.stored))
        maker.start()
        maker.join()
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        child(READ, folder), child(LOAD, folder)
        reads, loads = [], []
        for _ in range(args.runs):
            reads.append(child(READ, folder)["seconds"])
            loads.append(child(LOAD, folder))
    read, load = statistics.median(reads), statistics.median(run["seconds"] for run in loads)
    weights, peak = loads[0]["weights"], max(run["peak"] for run in loads)
    print(f"SD 1.5 shapes stored as {args.stored}, {size / 1e9:.2f} GB, loaded as bfloat16, {args.runs} runs")
    print(f"read   {read:6.2f} s  ({min(reads):.2f}-{max(reads):.2f})")
    spread = [run["seconds"] for run in loads]
    print(f"load   {load:6.2f} s  ({min(spread):.2f}-{max(spread):.2f})  = {load / read:.2f} x reading")
    print(f"peak   {peak / 1e9:6.2f} GB for {weights / 1e9:.2f} GB of weights = {peak / weights:.2f} x")


if __name__ == "__main__":
    main()
