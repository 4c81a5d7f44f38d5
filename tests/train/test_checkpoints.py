from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfumato.errors import FileError, MismatchError, SfumatoError
from sfumato.train.checkpoints import Checkpoints

HERE = Path(__file__).parent


def state(value):
    return {"w": jnp.full((300, 200), value, jnp.float32), "n": jnp.asarray(int(value), jnp.int32)}


def shapes(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


@pytest.fixture
def opened(tmp_path):
    """opened(**settings): the checkpoints of one folder, closed in the end."""
    every = []

    def get(**settings):
        every.append(Checkpoints(tmp_path / "checkpoints", **settings))
        return every[-1]

    yield get
    for each in every:
        each.close()


def fill(checkpoints, losses):
    for step, loss in losses.items():
        checkpoints.save(step, state(step), {"position": step}, {"loss": loss})
    checkpoints.wait()


def on_disk(checkpoints):
    return sorted(int(path.name) for path in checkpoints.folder.iterdir())


def test_comes_back(opened):
    fill(opened(), {3: 1.0, 7: 2.0})
    again = opened()
    got, data, step = again.restore(shapes(state(0)))
    assert (step, data) == (7, {"position": 7})
    np.testing.assert_array_equal(got["w"], state(7)["w"])
    assert got["n"] == 7
    assert again.written == 7


def test_nothing_to_come_back_to(opened):
    assert opened().restore(shapes(state(0))) is None


def test_the_last_and_the_best_stay(opened):
    checkpoints = opened(keep=2)
    fill(checkpoints, {1: 5.0, 2: 0.5, 3: 4.0, 4: 3.0, 5: 2.0})
    assert on_disk(checkpoints) == [2, 4, 5]
    assert checkpoints.best == 2
    again = opened(keep=2)  # and over a restart
    fill(again, {6: 1.0, 7: 0.1})
    assert on_disk(again) == [6, 7]
    assert again.best == 7


def test_only_the_last_without_a_metric(opened):
    checkpoints = opened(keep=1, best=None)
    fill(checkpoints, {1: 0.1, 2: 0.5, 3: 0.9})
    assert on_disk(checkpoints) == [3]
    assert checkpoints.best is None


def test_what_is_overwritten_meanwhile_is_saved_as_it_was(opened):
    """Writing goes on in the background while steps overwrite (donate) the arrays."""
    checkpoints = opened()
    more = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree), donate_argnums=0)
    now = more({f"w{number}": jnp.zeros((500, 500)) for number in range(20)})
    checkpoints.save(1, now, {}, {"loss": 0.0})
    for _ in range(5):
        now = more(now)
    checkpoints.wait()
    got, *_ = checkpoints.restore(shapes(now))
    assert all((leaf == 1).all() for leaf in jax.tree.leaves(got))


def test_what_a_killed_process_left_is_swept_up(opened):
    checkpoints = opened()
    fill(checkpoints, {1: 1.0})
    (checkpoints.folder / "2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (checkpoints.folder / ".trash" / "0").mkdir(parents=True)
    again = opened()
    assert again.written == 1
    assert on_disk(again) == [1]


def test_another_run(opened):
    fill(opened(), {1: 1.0})
    other = state(0) | {"w": jnp.zeros((300, 100))}
    with pytest.raises(MismatchError, match=r"for w it has \(300, 200\) and this run has \(300, 100\)"):
        opened().restore(shapes(other))
    with pytest.raises(MismatchError, match="for more it has none and this run has"):
        opened().restore(shapes(state(0) | {"more": jnp.zeros(3)}))


def test_a_damaged_one(opened):
    checkpoints = opened()
    fill(checkpoints, {1: 1.0})
    for path in (checkpoints.folder / "1" / "state").rglob("d/*"):
        path.write_bytes(b"damaged")
    with pytest.raises(FileError, match=r"checkpoints/1 cannot be read"):
        opened().restore(shapes(state(0)))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SfumatoError, match=r"Checkpoints cannot be written to .*: Not a directory\.$"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def start(**settings):
    return subprocess.Popen(
        [sys.executable, HERE / "fitting.py", json.dumps(settings, default=str)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


def told(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1]), err


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


RUN = {"steps": 40, "save_every": 3, "ema": 0.99, "clip": 1.0}


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(tmp_path):
    """kill -9 again and again: the same losses bit for bit, and the same weights, as a run that nobody disturbed."""
    whole, _ = told(start(folder=tmp_path / "whole", **RUN))
    rng, kills, folder = random.Random(0), 0, tmp_path / "killed"
    for _ in range(4):
        process = start(folder=folder, pause=0.05, **RUN)
        while process.poll() is None and not reached(folder, 8 * (kills + 1)):
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    resumed, _ = told(start(folder=folder, **RUN))
    assert 0 < len(resumed["losses"]) < RUN["steps"]
    assert losses(folder) == losses(tmp_path / "whole") == whole["losses"]
    assert resumed["total"] == whole["total"]


def reached(folder, step):
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays_good(tmp_path):
    run = {"folder": tmp_path / "run", "save_every": 4}
    before, _ = told(start(steps=8, **run))
    failed, err = told(start(steps=20, largest=30_000, **run))
    path = tmp_path / "run" / "checkpoints"
    assert failed["error"] == (
        f"The checkpoint of step 12 cannot be written to {path}: File too large; the last good one is {path / '8'}."
    )
    assert "Traceback" not in err
    assert sorted(each.name for each in path.iterdir()) == ["4", "8"]
    after, _ = told(start(steps=12, **run))
    assert len(before["losses"]) == 8
    assert len(after["losses"]) == 4
    assert losses(tmp_path / "run") == before["losses"] + after["losses"]
