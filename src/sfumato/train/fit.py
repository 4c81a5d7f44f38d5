"""`fit`: the one training loop."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from sfumato.errors import SfumatoError
from sfumato.train import pages, shard
from sfumato.train.checkpoints import Checkpoints
from sfumato.train.metrics import Metrics
from sfumato.train.step import STOP, Loss, Program, State, Step


@runtime_checkable
class Data(Protocol):
    """An endless iterator of host batches that can say where it is, in terms of JSON, and go back there."""

    def __next__(self) -> Any: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dc.dataclass(frozen=True)
class Result:
    """How a run ended. The weights are whole numpy arrays, in every process."""

    trainable: Any
    ema: Any
    """The moving average of the weights; None without `ema`."""
    step: int
    """Steps done, by this run and by those that it resumed."""
    metrics: Mapping[str, float]
    """Those of the last step that this run did; empty if it did none."""
    checkpoint: Path | None
    """The last one that was written."""
    best: Path | None
    """The checkpoint with the smallest value of the metric that was asked for."""
    stopped: bool
    """True if SIGINT or SIGTERM came before the last step. The same call goes on from there."""


def fit(
    loss: Loss,
    trainable: Any,
    data: Data,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    frozen: Any = (),
    collate: Callable[[Any], Any] | None = None,
    seed: int = 0,
    accumulate: int = 1,
    clip: float | None = None,
    ema: float | None = None,
    mesh: Mesh | None = None,
    fsdp: bool = False,
    folder: str | Path | None = None,
    save_every: int = 500,
    keep: int = 2,
    best: str | None = "loss",
    resume: bool = True,
    rates: Mapping[str, optax.Schedule] | None = None,
    on_step: Callable[[int, Callable[[], State], Mapping[str, jax.Array]], None] | None = None,
    tensorboard: bool = False,
    quiet: bool = False,
) -> Result:
    """Trains `trainable` until `steps` steps are done, and returns it.

    `loss` is compiled; its key is `jax.random.fold_in(jax.random.key(seed), step)` in step number `step` from 0 on.
    `optimizer` is any of optax, with its schedule in it; it never sees `frozen`. `data` gives this process's rows of
    a batch; `collate` makes arrays [B ...] of them.

    accumulate: parts that a batch is computed in, one after another. Their gradients are averaged, so that it saves
        memory and changes nothing else, but for the random draws: part number i has the key `fold_in(key, i)`.
    clip: the largest norm of all gradients together.
    ema: decay of a moving average of the weights. It warms up as (1 + step) / (10 + step), so that early weights are
        forgotten (as in TensorFlow's ExponentialMovingAverage).
    mesh: the devices, in one axis (`shard.mesh_of`); all devices of all processes if None.
    fsdp: weights, moments and averages are divided over the devices too, frozen ones also; otherwise each has all.
    folder: gets checkpoints/, metrics.jsonl and tensorboard/. With `resume`, a run that was cut off there goes on and
        has the same losses, bit for bit, as one that was not.
    save_every: steps between checkpoints, which are written in the background. The last `keep` stay, and the one with
        the smallest mean of the metric `best` since the checkpoint before it.
    rates: schedules, such as those of `optimizers.rates_of`, whose values in each step are told with the metrics under
        these names; they change nothing.
    on_step: called with the number of steps done, a function that gives the state, and the metrics, as soon as a step
        has been sent off; whoever looks at a value waits for it. The next step overwrites the state.

    SIGINT and SIGTERM end the run after the step under way, with a checkpoint. Raises SfumatoError for settings that
    do not fit, for a loss or gradients that are not finite, and if a checkpoint cannot be written.
    """
    _check(
        steps=steps, accumulate=accumulate, save_every=save_every, keep=keep, seed=seed, clip=clip, ema=ema,
        rates=rates or {},
    )  # fmt: skip
    mesh = shard.mesh_of() if mesh is None else mesh
    step = Step(loss, optax.with_extra_args_support(optimizer), accumulate, clip, ema, rates or {})
    folder = None if folder is None else Path(folder)
    with contextlib.ExitStack() as stack:
        saved = None
        if folder is not None:
            saved = stack.enter_context(contextlib.closing(Checkpoints(folder / "checkpoints", keep=keep, best=best)))
        state, done = _begin(step, trainable, data, mesh, fsdp, saved, resume)
        log = stack.enter_context(Metrics(
            folder, start=done, steps=steps, tensorboard=tensorboard, quiet=quiet, write=jax.process_index() == 0,
        ))  # fmt: skip
        frozen = shard.place(frozen, shard.layout(frozen, mesh, fsdp=fsdp))
        run = Run(step.compiled(state, frozen), data, mesh, saved, log, done, best)
        run.batches = _batches(data, collate)
        stack.callback(pages.give_back)
        stopped = run.until(steps, np.uint32(seed), accumulate, save_every, on_step, _signals(stack))
        if saved is not None:
            saved.wait()
        state = run.program.state
        return Result(
            shard.gather(state.trainable), shard.gather(state.ema), run.done, run.told,
            saved and saved.path(saved.written), saved and saved.path(saved.best), stopped,
        )  # fmt: skip


@dc.dataclass
class Run:
    """A run under way."""

    program: Program
    data: Data
    mesh: Mesh
    saved: Checkpoints | None
    log: Metrics
    done: int
    best: str | None
    batches: Iterator[Any] = dc.field(init=False)
    told: dict[str, float] = dc.field(default_factory=dict)
    """The metrics of the last step that was looked at."""
    seen: list[float] = dc.field(default_factory=list)
    """The values of the metric `best` since the last checkpoint."""
    stopping: bool = False
    """Some process has been told to stop; known to all of them after the same step."""

    def until(self, steps: int, seed: Any, parts: int, save_every: int, on_step: Any, wish: Callable[[], bool]) -> bool:
        """Goes on until `steps` steps are done; returns True if it was stopped before."""
        waiting = None
        alone = jax.process_count() == 1
        devices = len(self.mesh.local_devices)
        while self.done < steps and not self.stopping:
            host = next(self.batches)
            count = len(jax.tree.leaves(host)[0]) * jax.process_count()
            batch = shard.rows(host, self.mesh, parts)
            stop = shard.rows(np.full(devices, wish(), np.int32), self.mesh)
            metrics = self.program(batch, stop, seed)
            self.done += 1
            if on_step is not None:
                told = {name: value for name, value in metrics.items() if name != STOP}
                on_step(self.done, lambda: self.program.state, told)
            # A step is looked at when the next one has been sent off, so that the devices need not wait for the host.
            self._look(waiting)
            waiting = (self.done, metrics, count)
            self.stopping |= alone and wish()
            if self.done == steps or self.done % save_every == 0 or self.stopping:
                self._look(waiting)
                waiting = None
                self._save()
        return self.done < steps

    def _look(self, waiting: tuple[int, dict[str, jax.Array], int] | None) -> None:
        """Waits for the metrics of a step and writes them down. Raises SfumatoError if they are not finite."""
        if waiting is None:
            return
        step, metrics, samples = waiting
        told = {name: float(np.asarray(metrics[name])) for name in sorted(metrics, key=lambda name: name != "loss")}
        self.stopping |= told.pop(STOP) > 0
        for name, what in (("loss", "loss is"), ("grad_norm", "gradients are")):
            if not math.isfinite(told[name]):
                raise SfumatoError(f"In step {step} the {what} not finite ({told[name]}); {self._last()}.")
        self.told = told
        if self.best is not None:
            if self.best not in told:
                raise SfumatoError(
                    f"There is no metric {self.best!r} to find the best by; there are {', '.join(told)}."
                )
            self.seen.append(told[self.best])
        self.log.add(step, told, samples)

    def _last(self) -> str:
        if self.saved is None:
            return "nothing has been saved"
        self.saved.wait()
        path = self.saved.path(self.saved.written)
        return f"the last good checkpoint is {path}" if path else "no checkpoint had been written"

    def _save(self) -> None:
        if self.saved is not None and self.saved.latest != self.done:
            value = {self.best: float(np.mean(self.seen))} if self.best is not None else {}
            self.saved.save(self.done, self.program.state, self.data.get_state(), value)
            self.seen.clear()


def _begin(
    step: Step, trainable: Any, data: Data, mesh: Mesh, fsdp: bool, saved: Checkpoints | None, resume: bool
) -> tuple[State, int]:
    """The state to go on from, and the steps that are done; `data` is set to the same point."""
    shapes = jax.eval_shape(step.begin, trainable)
    places = shard.layout(shapes, mesh, fsdp=fsdp)
    if saved is not None and saved.written is not None and not resume:
        raise SfumatoError(f"{saved.folder} has checkpoints of an earlier run; name another folder or resume it.")
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, places
    )
    found = saved.restore(abstract) if saved is not None else None
    if found is not None:
        state, position, done = found
        data.set_state(position)
        return state, done
    placed = shard.place(trainable, shard.layout(trainable, mesh, fsdp=fsdp))
    return jax.jit(step.begin, out_shardings=places)(placed), 0


def _batches(data: Data, collate: Callable[[Any], Any] | None) -> Iterator[Any]:
    while True:
        try:
            batch = next(data)  # type: ignore[call-overload]
        except StopIteration:
            raise SfumatoError("The data has come to its end before the training; it must be endless.") from None
        yield batch if collate is None else collate(batch)


def _signals(stack: contextlib.ExitStack) -> Callable[[], bool]:
    """Whether the process has been asked to stop, by SIGINT or SIGTERM. A second one ends it at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        return lambda: False

    def ask(number: int, _: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, ask))
    return lambda: bool(asked)


def _check(**settings: Any) -> None:
    """Raises SfumatoError for numbers that make no sense."""
    for name, low in {"steps": 1, "accumulate": 1, "save_every": 1, "keep": 1, "seed": 0}.items():
        value = settings[name]
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < low or value >= 2**32:
            raise SfumatoError(f"{name} must be a whole number from {low} on, not {value!r}.")
    if settings["clip"] is not None and not settings["clip"] > 0:
        raise SfumatoError(f"clip must be above 0, not {settings['clip']!r}; None does not clip.")
    if settings["ema"] is not None and not 0 < settings["ema"] < 1:
        raise SfumatoError(f"ema is a decay between 0 and 1, such as 0.9999, not {settings['ema']!r}.")
    taken = sorted({"loss", "grad_norm", STOP} & settings["rates"].keys())
    if taken:
        raise SfumatoError(f"{taken[0]!r} is a metric of every run; call a schedule in rates something else.")
