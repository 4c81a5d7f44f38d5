"""Pages of memory that stay with the process: how many the system has to clear in a step."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import numpy as np
import pytest

from sfumato.train import pages

STEPS = """
import json, resource, jax, jax.numpy as jnp, numpy as np, optax
from sfumato.train import pages, shard
from sfumato.train.step import Step

if PREPARED:
    pages.prepare()

def loss(weight, frozen, batch, key):
    return jnp.tanh(weight * batch @ batch.T).mean(), {}

mesh = shard.mesh_of(jax.devices()[:1])
step = Step(loss, optax.with_extra_args_support(optax.sgd(0.1)), 1, None, None)
state = step.begin(np.float32(1))
program = step.compiled(shard.place(state, shard.layout(state, mesh, fsdp=False)), ())
rows, stop = np.random.default_rng(0).standard_normal((4096, 16), np.float32), np.zeros(1, np.int32)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    told = program(shard.rows(rows, mesh), shard.rows(stop, mesh), np.uint32(0))
    jax.block_until_ready(told)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1])

counts, before = [faults() for _ in range(15)], held()
pages.give_back()
print(json.dumps({"steps": counts, "back": before - held(), "weight": float(program.state.trainable)}))
"""


def steps(*, prepared: bool) -> dict:
    """What a fresh process counts, whose steps take 64 MB and more: 16384 pages of 4 KB."""
    text = STEPS.replace("PREPARED", str(prepared))
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one than GNU's")
def test_pages_stay_from_the_first_step_on_until_they_are_given_back():
    usual, kept = steps(prepared=False), steps(prepared=True)
    assert min(usual["steps"]) > 8192
    assert np.median(kept["steps"]) < 2048, "the first steps may still find no place that is large enough"
    assert usual["back"] < 8192 < kept["back"]
    assert kept["weight"] == usual["weight"]


def test_nothing_is_kept_in_a_process_that_was_not_prepared():
    assert not pages.prepared()
    assert not pages.keep()
    pages.give_back()
