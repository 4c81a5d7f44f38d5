"""What a step of training takes, by the compiler's own analysis, and that devices share the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def on_eight_devices(*arguments):
    """What a Python process with eight virtual devices prints."""
    out = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600,
        env=os.environ | {
            "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        },
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    return out.stdout


ATTENTION = """
import re, jax, jax.numpy as jnp, numpy as np, optax
from sfumato.models import kernels
from sfumato.train import shard
from sfumato.train.step import Step

def loss(weights, frozen, batch, key):
    q, k, v = (batch @ weights[name] for name in "qkv")
    return (kernels.attention(q, k, v) ** 2).mean(), {}

rng = np.random.default_rng(0)
weights = {name: rng.standard_normal((8, 8), np.float32) for name in "qkv"}
pictures, told = rng.standard_normal((8, 1500, 1, 8), np.float32), []
for count in (1, 8):
    mesh = shard.mesh_of(jax.devices()[:count])
    step = Step(loss, optax.with_extra_args_support(optax.sgd(0.1)), 1, None, None)
    state = shard.place(step.begin(weights), shard.layout(step.begin(weights), mesh, fsdp=True))
    stop = shard.rows(np.zeros(count, np.int32), mesh)
    arguments = shard.rows(pictures, mesh), stop, np.uint32(0)
    program = step.compiled(state, ())
    text = program.lower(*arguments).compile().as_text()
    told.append((program(*arguments), program.state))
assert not re.search(r" all-gather[(]| all-to-all[(]", text), "a device has the rows of others"
np.testing.assert_allclose(told[0][0]["loss"], loss(weights, (), pictures, None)[0], rtol=1e-5)
for one, other in zip(jax.tree.leaves(told[0]), jax.tree.leaves(told[1]), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
"""


@pytest.mark.slow
def test_remat_and_fsdp_take_less_memory():
    """A ControlNet of one level with 1024 positions, whose layers are large enough to be divided."""
    benchmark = HERE.parents[1] / "benchmarks" / "train_memory.py"
    plain = {"small": True, "cached": True, "size": 64}
    rows = [plain, plain | {"remat": True}, plain | {"remat": True, "devices": 8, "batch": 8}]
    kept, remat, shared = json.loads(on_eight_devices(benchmark, "--row", json.dumps(rows)).splitlines()[-1])
    assert remat["temporaries"] < 0.7 * kept["temporaries"]
    assert remat["arguments"] == kept["arguments"]
    # Small arrays lie whole on each device.
    assert remat["arguments"] / 8 < shared["arguments"] < remat["arguments"] / 7
    # The step overwrites the state: nothing comes out beside it but metrics.
    assert all(row["outputs"] < 2**20 for row in (kept, remat, shared))


@pytest.mark.slow
def test_every_device_attends_to_its_own_rows():
    """Large attention maps are made in a loop, which the compiler would have each device do for the rows of all."""
    on_eight_devices("-c", ATTENTION)
