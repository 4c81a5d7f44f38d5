"""Seconds of a training step against diffusers on torch, turn by turn in one process.

    python benchmarks/training_against_torch.py [--batch 16] [--runs 10]

A ControlNet of the embedded model, float32: forward, backward and AdamW, the UNet as it is. Both sides have the same
weights, noise, times and pictures; what is compared of the results is the UNet's output of the first step. torch runs
in channels_last.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from against_torch import Pair, compare, first, last
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import sfumato
from sfumato.embedded import find
from sfumato.train import pages
from sfumato.train.step import Step
from sfumato.train.task import masters
from sfumato.types import Conditioning

RATE = 1e-5


def data(batch: int, width: int) -> dict[str, np.ndarray]:
    """Noised latents, times, text features, control pictures, and what the UNet should say."""
    rng = np.random.default_rng(0)
    latents = (batch, 16, 16, 8)
    return {
        "x": rng.standard_normal(latents, np.float32), "t": rng.integers(0, 1000, batch).astype(np.float32),
        "context": rng.standard_normal((batch, 16, width), np.float32),
        "picture": rng.uniform(size=(batch, 128, 128, 3)).astype(np.float32),
        "target": rng.standard_normal(latents, np.float32),
    }  # fmt: skip


def pair(batch: int) -> Pair:
    """A step of each side, which goes on from the one before and gives the UNet's output."""
    model = sfumato.load("emoji", dtype="float32")
    given = data(batch, model.unet.config.cross_attention_dim)
    return Pair(ours(model, given), theirs(given))


def ours(model: Any, given: dict[str, np.ndarray]) -> Any:
    """sfumato's."""
    net = sfumato.load_controlnet("emoji-lines", dtype="float32")

    def loss(net: Any, unet: Any, batch: Any, key: Any) -> Any:
        cond = Conditioning(batch["context"])
        cond = Conditioning(batch["context"], residuals=net(batch["x"], batch["t"], cond, batch["picture"]))
        output = unet(batch["x"], batch["t"], cond).eps
        return jnp.square(output - batch["target"]).mean(), {"output": output}

    step, whole = Step(loss, optax.adamw(RATE), 1, None, None), NamedSharding(_mesh(), PartitionSpec())
    state = jax.device_put(step.begin(jax.tree.map(jnp.asarray, masters(net))), whole)
    unet, rows = jax.device_put((model.unet, {name: each[None] for name, each in given.items()}), whole)
    program, stop = step.compiled(state, unet), jnp.zeros((1, 1))
    return lambda: program(rows, stop, jnp.uint32(0))["output"]


def _mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:1]), ("data",))


def theirs(given: dict[str, np.ndarray]) -> Any:
    """diffusers'."""
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(find("emoji").path, subfolder="unet", torch_dtype=torch.float32)
    net = ControlNetModel.from_pretrained(find("emoji-lines").path, torch_dtype=torch.float32)
    unet.requires_grad_(requires_grad=False)
    for network in (unet, net):
        network.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=1e-4)
    x, picture, target = (first(given[name], "float32") for name in ("x", "picture", "target"))
    t, context = (torch.from_numpy(given[name]) for name in ("t", "context"))

    def run() -> torch.Tensor:
        with torch.inference_mode(mode=False), torch.enable_grad():
            down, mid = net(x, t, context, picture, return_dict=False)
            output = unet(
                x, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample  # fmt: skip
            torch.nn.functional.mse_loss(output, target).backward()
            optimizer.step()
            optimizer.zero_grad()
        return last(output.detach())

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--runs", type=int, default=10)
    args = parser.parse_args()
    pages.prepare()  # as `sfumato train` does; what it has the process keep, torch has the use of, too
    found = compare(pair(args.batch), args.runs)
    print(f"a training step of {args.batch} rows: {found['ratio']:.2f} x torch: {found['ours, s']:.2f} s; "
          f"outputs {found['off']:.1e} apart")  # fmt: skip
    print(json.dumps({**vars(args), "cores": os.cpu_count(), **found}))


if __name__ == "__main__":
    main()
