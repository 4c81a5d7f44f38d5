"""A tiny training run, for the tests of the loop; as a program it is one process of a run.

    python tests/train/fitting.py '{"folder": "...", "steps": 20, ...}'

prints one line of JSON when it is done. Its settings are those of `run`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sfumato.train import shard
from sfumato.train.fit import Result, fit

WIDTH = 128  # so that kernels are large enough to be divided by FSDP
ROWS = 16


class Data:
    """Rows of an endless seeded set: the share of process `index` of `count`."""

    def __init__(self, rows: int = ROWS, index: int = 0, count: int = 1):
        self.rows, self.index, self.count, self.position = rows, index, count, 0

    def __next__(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.position)
        self.position += 1
        x = rng.standard_normal((self.rows, 8)).astype(np.float32)
        batch = {"x": x, "y": np.sin(x.sum(1, keepdims=True))}
        share = self.rows // self.count
        return {name: value[self.index * share : (self.index + 1) * share] for name, value in batch.items()}

    def get_state(self) -> dict[str, Any]:
        return {"position": self.position}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def weights(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def layer(inputs: int, outputs: int) -> dict[str, np.ndarray]:
        kernel = rng.standard_normal((inputs, outputs)).astype(np.float32) / np.sqrt(inputs)
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(outputs, np.float32)}

    return {"first": layer(8, WIDTH), "middle": layer(WIDTH, WIDTH), "last": layer(WIDTH, 1)}


def forward(trainable: Any, x: Any) -> Any:
    for name in ("first", "middle"):
        x = jnp.tanh(x @ trainable[name]["kernel"] + trainable[name]["bias"])
    return x @ trainable["last"]["kernel"] + trainable["last"]["bias"]


def loss(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
    error = (forward(trainable, batch["x"]) - batch["y"] * frozen) ** 2
    return error.mean(), {"size": jnp.abs(batch["x"]).mean()}


def noisy(trainable: Any, frozen: Any, batch: Any, key: Any) -> Any:
    """With random numbers, as losses of diffusion models have them."""
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return loss(trainable, frozen, {"x": x, "y": batch["y"]}, key)


def share(leaf: Any) -> float:
    """How much of an array each device has."""
    return leaf.addressable_shards[0].data.size / leaf.size


def run(
    folder: str | Path | None = None, *, steps: int = 10, rows: int = ROWS, devices: int | None = None,
    pause: float = 0.0, fails_at: int | None = None, signal_at: int | None = None, number: int = signal.SIGTERM,
    shares: list[float] | None = None, **settings: Any,
) -> tuple[list[float], Result]:  # fmt: skip
    """The losses of the steps that were done, and how it ended."""
    data = Data(rows, jax.process_index(), jax.process_count())
    losses: list[Any] = []

    def on_step(step: int, state: Any, metrics: Any) -> None:
        losses.append(metrics["loss"])
        if shares is not None:
            shares[:] = [max(share(leaf) for leaf in jax.tree.leaves(state()) if leaf.size >= shard.SMALLEST)]
        if pause:
            time.sleep(pause)
        if step == signal_at and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), number)

    def collate(batch: Any) -> Any:
        if data.position == fails_at:
            batch = batch | {"y": np.full_like(batch["y"], np.nan)}
        return batch

    mesh = shard.mesh_of(jax.devices()[:devices])
    settings = {"optimizer": optax.adamw(1e-2), "loss": noisy, "trainable": weights(), "quiet": True} | settings
    result = fit(
        data=data, frozen=np.float32(0.5), steps=steps, folder=folder, mesh=mesh, on_step=on_step, collate=collate,
        **settings,
    )  # fmt: skip
    return [float(value) for value in losses], result


def main(text: str) -> None:
    settings = json.loads(text)
    if "address" in settings:
        shard.connect(settings.pop("address"), 2, settings.pop("index"))
    if "largest" in settings:  # a disk that is full, as far as this process can tell
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (settings.pop("largest"),) * 2)
    shares: list[float] = []
    try:
        losses, result = run(shares=shares, **settings)
    except ValueError as error:
        print(json.dumps({"error": str(error)}))
        return
    print(json.dumps({
        "losses": losses, "step": result.step, "stopped": result.stopped, "checkpoint": str(result.checkpoint),
        "share": shares[0] if shares else None,
        "total": sum(float(np.abs(leaf).sum()) for leaf in jax.tree.leaves(result.trainable)),
    }))  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
