from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfumato.errors import MismatchError, SfumatoError
from sfumato.train import shard
from sfumato.train.fit import fit
from sfumato.train.optimizers import optimizer as optimizer_of
from sfumato.train.optimizers import rates_of
from train import fitting

HERE = Path(__file__).parent
run = functools.partial(fitting.run, devices=1)


def close(one, other, tol=1e-5):
    np.testing.assert_allclose(one, other, rtol=tol, atol=tol)


@pytest.mark.slow
def test_equals_a_loop_by_hand():
    """The key of a step, the order of batches, the optimizer: what the docstring says."""
    data, now, optimizer = fitting.Data(), fitting.weights(), optax.adamw(1e-2)
    state, want = optimizer.init(now), []
    graded = jax.value_and_grad(fitting.noisy, has_aux=True)
    for step in range(4):
        key = jax.random.fold_in(jax.random.key(3), step)
        (value, _), gradients = graded(now, 0.5, next(data), key)
        updates, state = optimizer.update(gradients, state, now)
        now = optax.apply_updates(now, updates)
        want.append(float(value))
    losses, result = run(steps=4, seed=3)
    close(losses, want)
    jax.tree.map(close, result.trainable, now)
    assert result.step == 4
    assert not result.stopped
    assert result.checkpoint is result.best is result.ema is None
    assert result.metrics["loss"] == losses[-1]
    assert list(result.metrics) == ["loss", "grad_norm", "size"]


def test_parts_of_a_batch_are_the_same_step():
    whole, one = run(loss=fitting.loss, steps=4)
    parts, other = run(loss=fitting.loss, steps=4, accumulate=4)
    close(parts, whole)
    jax.tree.map(close, one.trainable, other.trainable)
    close(one.metrics["size"], other.metrics["size"])


def test_parts_of_a_batch_have_draws_of_their_own():
    def draw(trainable, frozen, batch, key):
        return jax.random.normal(key) + 0 * trainable["first"]["bias"].sum(), {}

    (drawn,), _ = run(loss=draw, steps=1, accumulate=2)
    key = jax.random.fold_in(jax.random.key(0), 0)
    close(drawn, np.mean([jax.random.normal(jax.random.fold_in(key, part)) for part in range(2)]))


def test_clips_the_norm_of_all_gradients_together():
    rate, want = 0.1, 0.5
    _, result = run(steps=1, optimizer=optax.sgd(rate), clip=want)
    moved = jax.tree.map(lambda new, old: (new - old) / rate, result.trainable, fitting.weights())
    close(optax.global_norm(moved), want, 1e-4)
    assert result.metrics["grad_norm"] > want  # told as it was
    _, gentle = run(steps=1, optimizer=optax.sgd(rate), clip=1e6)
    _, free = run(steps=1, optimizer=optax.sgd(rate))
    jax.tree.map(close, gentle.trainable, free.trainable)


def test_the_average_of_the_weights():
    seen = []

    def on_step(step, state, metrics):
        seen.append(jax.device_get(state().trainable))

    data, mesh = fitting.Data(), shard.mesh_of(jax.devices()[:1])
    result = fit(
        fitting.loss, fitting.weights(), data, optax.sgd(0.1), frozen=1.0, steps=6, ema=0.3, mesh=mesh, on_step=on_step,
        quiet=True,
    )  # fmt: skip
    average = fitting.weights()
    for step, weights in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, weights)
    jax.tree.map(close, result.ema, average)


def test_an_optimizer_sees_only_what_is_trained_and_nothing_of_the_caller_is_overwritten():
    big, trainable = jnp.ones((64, 1000)), jax.tree.map(jnp.asarray, fitting.weights())
    sizes = []

    def loss(trainable, frozen, batch, key):
        return fitting.loss(trainable, frozen.mean(), batch, key)

    def on_step(step, state, metrics):
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state().optimizer)))

    fit(
        loss, trainable, fitting.Data(), optax.adamw(1e-2), frozen=big, steps=2, on_step=on_step, quiet=True,
        mesh=shard.mesh_of(jax.devices()[:1]),
    )  # fmt: skip
    assert sizes[0] <= 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable)) + 2
    jax.tree.map(np.testing.assert_array_equal, trainable, fitting.weights())
    np.testing.assert_array_equal(big, 1)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", [
    optax.adafactor(1e-3),
    optax.lion(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 2, 6)),
    optax.contrib.prodigy(),
    optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    optax.multi_transform({"a": optax.adam(1e-3), "b": optax.sgd(1e-2)}, {"first": "a", "middle": "b", "last": "a"}),
    optax.inject_hyperparams(optax.adamw)(optax.linear_schedule(0.0, 1e-3, 3)),
], ids=["adafactor", "lion, cosine", "prodigy", "plateau", "two groups", "injected"])  # fmt: skip
def test_optimizers_of_optax_with_a_resumption(optimizer, tmp_path):
    settings = {"optimizer": optimizer, "steps": 4}
    whole, one = run(**settings)
    first, _ = run(tmp_path, **settings | {"steps": 2})
    second, other = run(tmp_path, **settings)
    assert first + second == whole
    jax.tree.map(np.testing.assert_array_equal, one.trainable, other.trainable)


def test_resumed_is_the_same_bit_for_bit(tmp_path):
    settings = {"ema": 0.99, "clip": 1.0, "accumulate": 2, "save_every": 2}
    whole, one = run(tmp_path / "whole", steps=7, **settings)
    first, _ = run(tmp_path / "parts", steps=3, **settings)
    second, other = run(tmp_path / "parts", steps=7, **settings)
    assert len(second) == 4
    assert first + second == whole
    jax.tree.map(np.testing.assert_array_equal, (one.trainable, one.ema), (other.trainable, other.ema))
    assert other.checkpoint == (tmp_path / "parts" / "checkpoints" / "7").absolute()
    assert other.best is not None
    third, again = run(tmp_path / "parts", steps=7, **settings)
    assert third == []
    assert again.metrics == {}
    jax.tree.map(np.testing.assert_array_equal, one.trainable, again.trainable)


def test_will_not_write_over_another_run(tmp_path):
    run(tmp_path, steps=1)
    with pytest.raises(SfumatoError, match="has checkpoints of an earlier run; name another folder or resume it"):
        run(tmp_path, steps=2, resume=False)
    with pytest.raises(MismatchError, match="is of another run: for ema/first/bias it has none"):
        run(tmp_path, steps=2, ema=0.9)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    whole, _ = run(steps=6)
    before = signal.getsignal(number)
    first, stopped = run(tmp_path, steps=6, signal_at=3, number=number)
    assert signal.getsignal(number) is before
    assert (stopped.stopped, stopped.step) == (True, 3)
    assert stopped.checkpoint is not None
    assert stopped.checkpoint.name == "3"
    second, done = run(tmp_path, steps=6)
    assert not done.stopped
    assert first + second == whole


def test_one_program_trains_networks_and_frozen_ones_stay(compiled, tmp_path):
    from flax import nnx

    from sfumato.models.layers import linear

    def loss(network, frozen, batch, key):
        return ((network(batch["x"]) - frozen(batch["x"])) ** 2).mean(), {}

    trainable, frozen = linear(8, 2, rngs=nnx.Rngs(0)), linear(8, 2, rngs=nnx.Rngs(1))
    before = jax.tree.map(np.array, frozen)
    result = fit(
        loss, trainable, fitting.Data(), optax.adam(0.1), frozen=frozen, steps=5, quiet=True,
        mesh=shard.mesh_of(jax.devices()[:1]),
    )  # fmt: skip
    assert compiled.count("jit(train_step)") == 1
    assert isinstance(result.trainable, nnx.Linear)
    jax.tree.map(np.testing.assert_array_equal, frozen, before)


def test_a_second_signal_ends_it_at_once():
    def on_step(step, state, metrics):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(fitting.loss, fitting.weights(), fitting.Data(), optax.sgd(0.1), frozen=1.0, steps=9, on_step=on_step,
            quiet=True, mesh=shard.mesh_of(jax.devices()[:1]))  # fmt: skip


def test_rates_are_told_and_change_nothing(tmp_path):
    """Also after a resumption, where the schedule goes on."""
    rates = rates_of(1e-2, steps=4, schedule="linear", rates_by={"last": 0.5})
    settings = {"optimizer": optimizer_of("adamw", 1e-2, steps=4, schedule="linear", rates_by={"last": 0.5})}
    first, _ = run(tmp_path, steps=2, rates=rates, **settings)
    second, result = run(tmp_path, steps=4, rates=rates, **settings)
    assert first + second == run(steps=4, **settings)[0]
    assert list(result.metrics) == ["loss", "grad_norm", "learning_rate", "learning_rate_last", "size"]
    told = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    close([line["learning_rate"] for line in told], [1e-2, 0.75e-2, 0.5e-2, 0.25e-2])
    close([line["learning_rate_last"] for line in told], [0.5e-2, 0.375e-2, 0.25e-2, 0.125e-2])


@pytest.mark.slow
def test_a_loss_that_is_not_finite(tmp_path):
    """The state after such a step is never saved, not even when it is the step to save."""
    with pytest.raises(SfumatoError) as caught:
        run(tmp_path, steps=9, save_every=2, fails_at=6)
    path = tmp_path / "checkpoints"
    assert str(caught.value) == f"In step 6 the loss is not finite (nan); the last good checkpoint is {path / '4'}."
    assert sorted(each.name for each in path.iterdir()) == ["2", "4"]
    losses, _ = run(tmp_path, steps=9, save_every=2)
    assert losses == run(steps=9)[0][4:]
    with pytest.raises(SfumatoError, match=r"In step 2 .* nothing has been saved"):
        run(steps=3, fails_at=2)
    with pytest.raises(SfumatoError, match=r"no checkpoint had been written"):
        run(tmp_path / "other", steps=3, fails_at=2)


def test_gradients_that_are_not_finite(tmp_path):
    def root(trainable, frozen, batch, key):
        return jnp.sqrt(trainable["first"]["bias"]).sum(), {}

    with pytest.raises(SfumatoError, match=r"In step 1 the gradients are not finite \(inf\)"):
        run(loss=root, steps=3)


def test_data_that_ends():
    class Short(fitting.Data):
        def __next__(self):
            if self.position == 2:
                raise StopIteration
            return super().__next__()

    with pytest.raises(SfumatoError, match="it must be endless"):
        fit(fitting.loss, fitting.weights(), Short(), optax.sgd(0.1), frozen=1.0, steps=9, quiet=True,
            mesh=shard.mesh_of(jax.devices()[:1]))  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), [
    ({"steps": 0}, "steps must be a whole number from 1 on, not 0"),
    ({"seed": -1}, "seed must be a whole number from 0 on, not -1"),
    ({"clip": 0.0}, "clip must be above 0, not 0.0"),
    ({"ema": 1.0}, "ema is a decay between 0 and 1"),
    ({"accumulate": 3}, "A batch of 16 cannot be divided into 3 parts on 1 devices; make it a multiple of 3"),
    ({"rates": {"loss": optax.constant_schedule(1.0)}}, "'loss' is a metric of every run"),
    ({"best": "accuracy"}, "There is no metric 'accuracy' to find the best by; there are loss, grad_norm, size"),
])  # fmt: skip
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(SfumatoError, match=message):
        run(**settings)


def process(*, devices=1, **settings):
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, HERE / "fitting.py", json.dumps(settings, default=str)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def told(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def pair(**settings):
    """What two processes of one run say, with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    return [told(each) for each in [process(devices=4, address=address, index=index, **settings) for index in range(2)]]


STEPS = {"steps": 6, "ema": 0.9, "clip": 1.0, "accumulate": 2}


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp"])
def test_eight_devices_have_the_same_losses(fsdp):
    want, one = run(**STEPS)
    got = told(process(devices=8, fsdp=fsdp, **STEPS))
    close(got["losses"], want)
    close(got["total"], sum(np.abs(leaf).sum() for leaf in jax.tree.leaves(one.trainable)), 1e-4)
    assert got["share"] == (1 / 8 if fsdp else 1)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["data parallel", "fsdp"])
def test_two_processes_have_the_same_losses(fsdp, tmp_path):
    """And a checkpoint of theirs resumes; metrics are written once."""
    want, _ = run(**STEPS)
    first = pair(folder=tmp_path, fsdp=fsdp, **STEPS | {"steps": 3})
    second = pair(folder=tmp_path, fsdp=fsdp, **STEPS)
    for one, other in zip(first, second, strict=True):
        close(one["losses"] + other["losses"], want)
    assert second[0]["total"] == second[1]["total"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))
    with pytest.raises(MismatchError, match="is of a run of 2 processes, and these are 1"):
        run(tmp_path, **STEPS)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(tmp_path):
    one, other = pair(folder=tmp_path, steps=20, signal_at=3)
    assert one["stopped"]
    assert other["stopped"]
    assert one["step"] == other["step"] < 8
    assert one["checkpoint"].endswith(f"/{one['step']}")


@pytest.mark.slow
def test_goes_on_with_another_number_of_devices(tmp_path):
    want, _ = run(steps=5)
    first = told(process(devices=8, folder=tmp_path, steps=2, fsdp=True))
    second, _ = run(tmp_path, steps=5)
    close(first["losses"] + second, want)


def test_rows_that_cannot_be_divided():
    got = told(process(devices=8, steps=2, rows=12))
    assert (
        got["error"] == "A batch of 12 cannot be divided into 8 devices; make it a multiple of 8 or use fewer devices."
    )


def test_the_largest_axis_that_can_be_divided():
    assert shard.spec((3, 3, 640, 1280), 8) == jax.sharding.PartitionSpec(None, None, None, "data")
    assert shard.spec((3, 3, 1280, 640), 8) == jax.sharding.PartitionSpec(None, None, "data")
    assert shard.spec((1281, 640), 8) == jax.sharding.PartitionSpec(None, "data")
    assert shard.spec((1281, 641), 8) == jax.sharding.PartitionSpec()
    assert shard.spec((640,), 8) == jax.sharding.PartitionSpec()
