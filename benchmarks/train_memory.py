"""Memory of one ControlNet training step at SD 1.5's size, by what the compiler reports. Nothing is allocated.

    python benchmarks/train_memory.py [--dtypes float32 bfloat16] [--batches 1 8] [--remat no yes] [--tpu v5e:2x4]

It is the very step of `fit` (AdamW, float32 masters, donated state) on abstract weights, compiled for one device, and
for several with FSDP, of which each then has its share of the weights and of the batch. Each row is compiled in a
process of its own, which is ended after `--limit` seconds. Figures are for each device.

By default the devices are virtual ones of the CPU. XLA's CPU compiler widens bfloat16 to float32 and schedules for
locality more than for memory, so that its temporaries are an upper bound. With `--tpu`, and `pip install libtpu`
(the version of `jax[tpu]`), the step is compiled for TPUs of that topology, which need not be there.
"""

from __future__ import annotations

import argparse
import dataclasses as dc
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
"""Machine code that is never run need not be fast. Buffers are assigned before."""


@dc.dataclass(frozen=True)
class Row:
    """A step to compile."""

    dtype: str = "float32"
    """What is computed in; masters and AdamW's moments are float32."""
    batch: int = 1
    """Pictures of all devices together."""
    devices: int = 1
    """More than one share the weights (FSDP)."""
    fsdp: bool = True
    remat: bool = False
    """Gradient checkpointing."""
    cached: bool = False
    """Latents and text features are in the batch; there is no autoencoder and no text encoder."""
    size: int = 512
    """Pixels along a side."""
    small: bool = False
    """The same with tiny networks."""
    tpu: str | None = None
    """The topology to compile for."""


def networks(small: bool) -> dict[str, Any]:
    """SD 1.5's networks and their ControlNet, without numbers."""
    from sfumato.models.clip import VIT_L_14, ClipTextEncoder
    from sfumato.models.config import ControlNetConfig, EncoderConfig, UNetConfig
    from sfumato.models.controlnet import ControlNet
    from sfumato.models.layers import abstract
    from sfumato.models.unet import UNet
    from sfumato.models.vae import AutoencoderKL, VAEConfig

    unet = UNetConfig(cross_attention_dim=768, sample_size=64)
    vae = VAEConfig(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
    )  # fmt: skip
    text, reading = VIT_L_14, (16, 32, 96, 256)
    if small:
        unet = dc.replace(
            unet, block_out_channels=(128,), layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )  # fmt: skip
        vae = dc.replace(
            vae, block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )  # fmt: skip
        text, reading = dc.replace(text, num_hidden_layers=1), (16, 32)
    shared = {field.name: getattr(unet, field.name) for field in dc.fields(EncoderConfig)}
    control = ControlNetConfig(**shared, conditioning_embedding_out_channels=reading)
    return {
        "unet": abstract(UNet, unet), "vae": abstract(AutoencoderKL, vae),
        "text_encoder": abstract(ClipTextEncoder, text), "controlnet": abstract(ControlNet, control),
    }  # fmt: skip


def batch(nets: Mapping[str, Any], row: Row) -> dict[str, Any]:
    """The shapes of a collated batch."""
    import jax
    import jax.numpy as jnp

    def rows(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((row.batch, *shape), dtype)

    found = {"conditioning": rows(row.size, row.size, 3)}
    if row.cached:
        latent = row.size // nets["vae"].factor
        return found | {"latents": rows(latent, latent, 4), "context": rows(77, 768)}
    return found | {"pixels": rows(row.size, row.size, 3), "tokens": {"text_encoder": rows(77, dtype=jnp.int32)}}


def mesh_of(row: Row) -> Any:
    """The devices of a row."""
    import jax

    from sfumato.train import shard

    if row.tpu is None:
        return shard.mesh_of(jax.devices()[: row.devices])
    from jax.experimental import topologies

    return shard.mesh_of(topologies.get_topology_desc(row.tpu, platform="tpu").devices[: row.devices])


def lowered(row: Row) -> tuple[Any, float]:
    """The step of a row, ready to be compiled; and the bytes that a device has for all that `fit` lays there."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import NamedSharding, PartitionSpec

    from sfumato.io.defaults import SAMPLER, SCHEDULER
    from sfumato.io.family import Family
    from sfumato.model import Model
    from sfumato.schedule import Schedule
    from sfumato.text.tokenizer import clip_tokenizer
    from sfumato.train import shard
    from sfumato.train.denoising import Denoising
    from sfumato.train.recipes.controlnet import steered
    from sfumato.train.step import Step
    from sfumato.train.task import cast, checkpointed

    nets, mesh = networks(row.small), mesh_of(row)
    model = Model(
        nets["unet"], nets["vae"], {"text_encoder": nets["text_encoder"]}, {"tokenizer": clip_tokenizer()},
        Schedule.from_config({**SCHEDULER, **SAMPLER[Family.SD1]}), Family.SD1,
    )  # fmt: skip
    nets = {name: checkpointed(net, row.remat) for name, net in nets.items()}
    trainable = {"controlnet": nets.pop("controlnet")}
    if row.cached:
        blank = jax.eval_shape(lambda: jnp.zeros((1, 77, 768)))
        nets = {"unet": nets["unet"], "blank": (blank, None)}
    frozen = jax.eval_shape(lambda nets: cast(nets, row.dtype), nets)
    loss = Denoising.of(model, dtype=row.dtype, extend=steered).loss
    step = Step(loss, optax.with_extra_args_support(optax.adamw(1e-5)), 1, 1.0, None)

    def placed(tree: Any) -> Any:
        places = shard.layout(tree, mesh, fsdp=row.fsdp)
        return jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), tree, places)

    rows = NamedSharding(mesh, PartitionSpec(None, shard.DATA))
    shapes = {**batch({"vae": model.vae}, row), "stop": jax.ShapeDtypeStruct((row.devices,), np.int32)}
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape), a.dtype, sharding=rows), shapes)
    stop = shapes.pop("stop")
    state, frozen = placed(jax.eval_shape(step.begin, trainable)), placed(frozen)
    laid = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state, frozen, shapes))
    )
    return step.compiled(state, frozen).lower(shapes, stop, np.uint32(0)), laid


def analysed(row: Row) -> dict[str, float]:
    """Bytes for each device, and what the compiler took."""
    import resource

    from sfumato.models.kernels.table import Table, using

    start = time.perf_counter()
    with using(Table()):  # whatever this processor takes
        program, laid = lowered(row)
    analysis = program.compile().memory_analysis()
    assert analysis is not None, "this backend does not tell"
    return {
        "laid": laid,
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "seconds": time.perf_counter() - start,
        "compiler": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def child(row: Row, limit: float) -> dict[str, float] | str:
    """`analysed`, in a process of its own; why there is nothing if it fails."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} --xla_force_host_platform_device_count={row.devices}"
    command = [sys.executable, __file__, "--row", json.dumps([dc.asdict(row)])]
    try:
        out = subprocess.run(
            command, capture_output=True, text=True, timeout=limit,
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not done after {limit:.0f} s"
    if out.returncode:
        return (out.stderr.strip().splitlines() or [f"exit {out.returncode}"])[-1]
    return json.loads(out.stdout.splitlines()[-1])[0]


HEAD = (
    "compute", "inputs", "devices", "pictures", "remat",
    "laid out", "arguments", "outputs", "temporaries", "together", "compiled in", "with",
)  # fmt: skip


def line(row: Row, found: dict[str, float] | str) -> str:
    """A line of the table."""
    cells = [row.dtype, "cached" if row.cached else "pictures", str(row.devices), str(row.batch)]
    cells += ["yes" if row.remat else "no"]
    if isinstance(found, str):
        return f"| {' | '.join([*cells, found, *[''] * (len(HEAD) - len(cells) - 1)])} |"
    parts = [found[name] for name in ("laid", "arguments", "outputs", "temporaries")]
    parts += [sum(parts[1:])]
    cells += [f"{part / 2**30:.2f}" for part in parts]
    cells += [f"{found['seconds']:.0f} s", f"{found['compiler'] / 2**30:.1f} GiB"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="pictures for each device")
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--remat", nargs="+", choices=["no", "yes"], default=["no", "yes"])
    parser.add_argument("--cached", nargs="+", choices=["no", "yes"], default=["no"])
    parser.add_argument("--no-fsdp", action="store_true", help="every device has all weights")
    parser.add_argument("--size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--small", action="store_true", help="tiny networks, to see that it works")
    parser.add_argument("--tpu", metavar="TOPOLOGY", help="compile for TPUs, such as v5e:2x4")
    parser.add_argument("--limit", type=float, default=1800, help="seconds for a row")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps([analysed(Row(**row)) for row in json.loads(args.row)]))
        return
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}", flush=True)
    for dtype, cached, devices, pictures, remat in itertools.product(
        args.dtypes, args.cached, args.devices, args.batches, args.remat
    ):
        row = Row(
            dtype, pictures * devices, devices, not args.no_fsdp, remat == "yes", cached == "yes", args.size,
            args.small, args.tpu,
        )  # fmt: skip
        print(line(row, child(row, args.limit)), flush=True)


if __name__ == "__main__":
    main()
