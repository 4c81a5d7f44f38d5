"""What the compilers for a GPU and a TPU make of the UNet of SD 1.5, on a machine that has neither.

    pip install "jax[cuda12]"        or        pip install "jax[tpu]"
    python benchmarks/other_devices.py h100 [--dtype bfloat16] [--rows 2] [--size 64]
    python benchmarks/other_devices.py v5e

One evaluation, with kernels as they are chosen for such a device and, beside it, as on a processor. Prints the GiB of
temporaries, those that kernels write in all, the calls of fused kernels, all kernels and the loops of the compiled
program. Nothing runs, so there are no times. For a GPU that is not there the compiler cannot try forms of a product
out, and its default for some does not compile; `--xla_gpu_enable_triton_gemm=false`, set here, leaves products to
cuBLAS.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from sfumato.models.config import UNetConfig
from sfumato.models.kernels import fused
from sfumato.models.kernels.table import Table, using
from sfumato.models.layers import abstract
from sfumato.models.unet import UNet
from sfumato.types import Conditioning

PLACE = importlib.import_module("sfumato.models.kernels.attention")  # the package has a function of this name

H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 8 patch: 0 }
runtime_version { major: 12 minor: 9 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
}
"""
"""What the compiler has to know of such a device, by the names of XLA's GpuTargetConfig. It estimates with the
rates and sizes; what is printed here is not measured in them."""


def device(name: str) -> Any:
    """One that is not there."""
    if name == "h100":
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_triton_gemm=false"
        described = topologies.get_topology_desc(name, platform="cuda", target_config=H100, topology="1x1x1")
    else:
        os.environ |= {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-4",
            "TPU_WORKER_HOSTNAMES": "localhost",
        }
        described = topologies.get_topology_desc("v5e:2x2x1", platform="tpu")
    return described.devices[0]


def evaluation(unet: UNet, x: Any, t: Any, context: Any) -> Any:
    """One."""
    return unet(x, t, Conditioning(context)).eps


def written(line: str) -> int:
    """Bytes of the results of a line of a compiled program."""
    results = re.findall(r"\b[a-z]+(\d+)\S*?\[([\d,]*)\]", re.split(r" (?:fusion|custom-call)\(", line)[0])
    return sum(int(bits) * math.prod(int(size) for size in sizes.split(",") if size) // 8 for bits, sizes in results)


def compiled(where: Any, backend: str, dtype: str, rows: int, size: int) -> dict[str, float]:
    """What comes of it for the device `where`, with the kernels of `backend`."""
    PLACE.default_backend = jax.default_backend = lambda: backend
    place = jax.sharding.SingleDeviceSharding(where)

    def shape(shape: tuple[int, ...], dtype: str = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    unet = abstract(UNet, UNetConfig(cross_attention_dim=768, sample_size=size))
    unet = jax.tree.map(lambda leaf: shape(leaf.shape, dtype), unet)
    at = shape((rows, size, size, 4)), shape(()), shape((rows, 77, 768))
    jax.clear_caches()
    with using(Table()):  # whatever this processor takes
        program = jax.jit(evaluation).lower(unet, *at).compile()
    memory, text = program.memory_analysis(), program.as_text() or ""
    assert memory is not None, "this compiler does not tell"
    kernels = [line for line in text.splitlines() if re.search(r" (fusion|custom-call)\(", line)]
    return {
        "GiB of temporaries": memory.temp_size_in_bytes / 2**30,
        "GiB written": sum(written(line) for line in kernels) / 2**30,
        "fused": sum(map(text.count, (*(f'"{name}"' for name in fused.CALLS), '"tpu_custom_call"'))),
        "kernels": len(kernels),
        "loops": text.count(" while("),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", choices=("h100", "v5e"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    where = device(args.device)
    for name, backend in (("as chosen", "gpu" if args.device == "h100" else "tpu"), ("as on a processor", "cpu")):
        found = compiled(where, backend, args.dtype, args.rows, args.size)
        print(f"{name:18}", ", ".join(f"{key} {value:.3g}" for key, value in found.items()))
        print(json.dumps({**vars(args), "kernels": name, **found}), flush=True)


if __name__ == "__main__":
    main()
