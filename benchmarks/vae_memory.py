"""Working memory of the Stable Diffusion decoder (float32, batch of one), by what the compiler reports.

Nothing is allocated: the network is abstract. Run: python benchmarks/vae_memory.py [--size 1024] [--tile 64]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from sfumato import compiler
from sfumato.models.layers import abstract
from sfumato.models.tiling import tiled_decode
from sfumato.models.vae import AutoencoderKL, VAEConfig

SD = VAEConfig(
    block_out_channels=(128, 256, 512, 512), layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4, sample_size=512,
)  # fmt: skip


def decode(vae: AutoencoderKL, latents: Array) -> Array:
    """The untiled decoder."""
    return vae.decode(latents)


def working_memory(fn: Callable[[AutoencoderKL, Array], Array], size: int) -> int:
    """Bytes that decoding a picture of `size` x `size` pixels needs beside weights, latents and picture."""
    vae = abstract(AutoencoderKL, SD)
    latents = jax.ShapeDtypeStruct((1, size // 8, size // 8, 4), jnp.float32)
    analysis = jax.jit(fn, compiler_options=compiler.options()).lower(vae, latents).compile().memory_analysis()
    assert analysis is not None, "this backend does not tell"
    return analysis.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="side of the picture in pixels")
    parser.add_argument("--tile", type=int, default=64, help="side of a tile in latents")
    args = parser.parse_args()
    ways = {"whole": decode, f"tiles of {args.tile}": partial(tiled_decode, tile=args.tile)}
    for name, fn in ways.items():
        print(f"{name:>14}: {working_memory(fn, args.size) / 2**20:8.0f} MB")


if __name__ == "__main__":
    main()
