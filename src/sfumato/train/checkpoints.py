"""The checkpoints of a run: written by orbax in the background, complete or not there at all."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sfumato.errors import FileError, MismatchError, SfumatoError

TRASH = ".trash"
UNFINISHED = ".orbax-checkpoint-tmp"
"""What orbax appends to the name of a checkpoint that it is writing."""
FORMAT = 1


class Checkpoints:
    """The checkpoints in `folder`, one folder a step; all processes of a run call alike.

    The last `keep` stay, and the one whose metric `best` is smallest. A checkpoint appears by one renaming after all of
    it has been written, and leaves by one renaming before anything of it is deleted: each is good at any moment.

    Raises SfumatoError for a folder that cannot be written.
    """

    def __init__(self, folder: Path, *, keep: int = 2, best: str | None = "loss"):
        self.folder = folder.absolute()
        self.first = jax.process_index() == 0
        _quiet()
        self._probe()
        policies: list[Any] = [LatestN(keep)]
        metric = (lambda metrics: metrics[best]) if best else None
        self.ranked = best is not None
        if metric:
            policies.append(BestN(get_metric_fn=metric, reverse=True, n=1, keep_checkpoints_without_metrics=False))
        self.manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies), best_fn=metric, best_mode="min",
                todelete_subdir=TRASH, enable_async_checkpointing=True,
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "run": ocp.JsonCheckpointHandler()},
        )  # fmt: skip
        self.written = self.manager.latest_step()

    def _probe(self) -> None:
        if not self.first:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._empty()
            probe = self.folder / f".writable-{os.getpid()}"
            probe.write_bytes(b"x")
            probe.unlink()
        except OSError as error:
            raise SfumatoError(f"Checkpoints cannot be written to {self.folder}: {error.strerror}.") from error

    def _empty(self) -> None:
        """Deletes what is no checkpoint any more, or has not become one; nothing may be under way."""
        if self.first:
            for folder in (self.folder / TRASH, *self.folder.glob(f"*{UNFINISHED}*")):
                shutil.rmtree(folder, ignore_errors=True)

    def path(self, step: int | None) -> Path | None:
        """The folder of a step's checkpoint."""
        return None if step is None else self.folder / str(step)

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, be it still under way."""
        return self.written if self.pending is None else self.pending

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint, once it has been written."""
        return self.manager.best_step() if self.ranked else None

    def save(self, step: int, state: Any, data: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Begins to write the state after `step` steps, and where each process is in its `data`.

        The arrays may be changed once this returns. Raises SfumatoError if this or the last one cannot be written.
        """
        self.wait()
        run = {"format": FORMAT, "step": step, "data": states_of(data)}
        self.pending = step
        try:
            self.manager.save(
                step, metrics=dict(metrics), force=True,
                args=ocp.args.Composite(state=ocp.args.StandardSave(named(state)), run=ocp.args.JsonSave(run)),
            )  # fmt: skip
        except Exception as error:  # orbax and tensorstore have no common type for failed writes
            raise self._failed(error) from error

    pending: int | None = None
    """The step that is being written."""

    def wait(self) -> None:
        """Waits until all is written. Raises SfumatoError if it cannot be."""
        if self.pending is None:
            return
        try:
            self.manager.wait_until_finished()
        except Exception as error:
            raise self._failed(error) from error
        self.written, self.pending = self.pending, None
        self._empty()

    def _failed(self, error: Exception) -> SfumatoError:
        step, self.pending = self.pending, None
        self._empty()  # what there is of it takes room
        last = f"the last good one is {self.path(self.written)}" if self.written is not None else "there is no other"
        return SfumatoError(
            f"The checkpoint of step {step} cannot be written to {self.folder}: {reason(error)}; {last}."
        )

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any], int] | None:
        """The newest state, in the places that `abstract` has for it, this process's state of the data, and the step.

        None if there is no checkpoint. Raises MismatchError for one of another run, FileError for a damaged one.
        """
        step = self.manager.latest_step()
        if step is None:
            return None
        path, want = self.path(step), named(abstract)
        try:
            found = self.manager.item_metadata(step).state
            have = {name: tuple(leaf.shape) for name, leaf in found.items()}
        except Exception as error:
            raise FileError(f"The checkpoint {path} cannot be read: {reason(error)}.") from error
        wanted = {name: tuple(leaf.shape) for name, leaf in want.items()}
        for name in sorted({*have, *wanted}, key=str):
            if have.get(name) != wanted.get(name):
                what = [f"has {side[name]}" if name in side else "has none" for side in (have, wanted)]
                raise MismatchError(
                    f"The checkpoint {path} is of another run: for {name} it {what[0]} and this run {what[1]}; "
                    "name another folder."
                )
        try:
            items: Any = self.manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(want), run=ocp.args.JsonRestore())
            )
        except Exception as error:
            raise FileError(f"The checkpoint {path} cannot be read: {reason(error)}.") from error
        states = items.run["data"]
        if len(states) != jax.process_count():
            raise MismatchError(
                f"The checkpoint {path} is of a run of {len(states)} processes, and these are {jax.process_count()}."
            )
        leaves = [items.state[name] for name in want]
        state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)
        return state, states[jax.process_index()], step

    def close(self) -> None:
        """Waits for what is being written and lets go of the folder."""
        try:
            self.wait()
        finally:
            self.manager.close()


@functools.cache
def _quiet() -> None:
    """A failed write is raised in one sentence; without this, the stacks of all threads that had to do with it follow.

    orbax and asyncio log them, and tensorstore tells of further failures to an event loop that orbax has closed by
    then, which goes to `sys.unraisablehook` at any later time.
    """
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").addFilter(lambda record: UNFINISHED not in record.getMessage())
    hook = sys.unraisablehook

    def report(happened: Any) -> None:
        if str(happened.exc_value) != "Event loop is closed":
            hook(happened)

    sys.unraisablehook = report


def named(tree: Any) -> dict[str, Any]:
    """The leaves of `tree` by path. Flat, so that a checkpoint can be read without the classes that it is made of."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def states_of(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The state of the data in each process."""
    if jax.process_count() == 1:
        return [dict(data)]
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    lengths = np.asarray(multihost_utils.process_allgather(np.array(len(text)))).reshape(-1)
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    texts = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return [json.loads(row[:length].tobytes()) for row, length in zip(texts, lengths, strict=True)]


def reason(error: BaseException) -> str:
    """Why a file could not be written or read, in a few words."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        # tensorstore: "... No space left on device [os_error_code='28'] ..."
        if found := re.search(r"os_error_code='(\d+)'", str(seen)):
            return os.strerror(int(found[1]))
        seen = seen.__cause__ or seen.__context__
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
