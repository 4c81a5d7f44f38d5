"""How fast a model draws on this machine."""

from __future__ import annotations

import dataclasses as dc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import sfumato
from sfumato.errors import SfumatoError
from sfumato.machine import machine
from sfumato.models.kernels.table import measured, usual
from sfumato.plan import size_of
from sfumato.run import decode, tiling

PROMPT = "a red apple on a table"


@dc.dataclass(frozen=True)
class Times:
    """Seconds of several runs of the same."""

    each: tuple[float, ...]

    @property
    def median(self) -> float:
        """The one in the middle."""
        return statistics.median(self.each)


@dc.dataclass(frozen=True)
class Figures:
    """What `bench` found."""

    machine: Mapping[str, Any]
    program: Mapping[str, Any]
    load: float
    """Seconds."""
    first: float
    """Seconds of the first picture, compiling (or reading what was compiled before) included."""
    whole: Times
    """Seconds of all pictures of a run, text encoder and autoencoder included."""
    sampled: Times
    """The same without the autoencoder."""
    decoded: Times
    """The autoencoder alone."""
    memory: Mapping[str, int]
    """The most bytes in use: of the process, and of each device that counts its own."""

    def record(self) -> dict[str, Any]:
        """All of it as plain data; of times the median, the least and the most."""
        found = dc.asdict(self)
        for name in ("whole", "sampled", "decoded"):
            times = getattr(self, name)
            found[name] = {"median": times.median, "least": min(times.each), "most": max(times.each)}
        return found


def bench(
    source: str, *, steps: int | None = None, size: tuple[int, int] | None = None, count: int = 1, runs: int = 5,
    dtype: str | None = None, int8: bool = False, prepare: bool = False,
) -> Figures:  # fmt: skip
    """Loads the model `source`, draws `count` pictures at once with its own guidance, and that `runs` times more;
    with `int8` after `sfumato.quantize`, with `prepare` after `sfumato.prepare`, whose time counts as loading.

    Raises SfumatoError for fewer than 1 run, and for what `sfumato.generate` would not take.
    """
    if runs < 1:
        raise SfumatoError(f"runs must be a whole number from 1 on, not {runs}.")
    change = sfumato.quantize if int8 else sfumato.prepare if prepare else lambda model: model
    model, load = timed(lambda: change(sfumato.load(source, dtype=dtype)))
    steps = model.steps if steps is None else steps
    width, height = size_of(model, size)

    def draw(output: str, seed: int) -> Any:
        made = sfumato.generate(model, PROMPT, steps=steps, size=(width, height), count=count, seed=seed, output=output)
        return made if output == "latents" else made[-1].array

    first = timed(lambda: draw("images", 0))[1]
    latents = draw("latents", 0)
    tiled = tiling(latents.shape[1:], None)
    times: dict[str, list[float]] = {"whole": [], "sampled": [], "decoded": []}
    decode(model.vae, latents, tiled).block_until_ready()
    for seed in range(1, runs + 1):
        times["whole"].append(timed(lambda seed=seed: draw("images", seed))[1])
        times["sampled"].append(timed(lambda seed=seed: draw("latents", seed))[1])
        times["decoded"].append(timed(lambda: decode(model.vae, latents, tiled))[1])
    program = {
        "model": model.name or source, "family": str(model.family), "dtype": model.dtype, "int8": int8,
        "prepare": prepare, "size": [width, height], "steps": steps, "pictures": count, "guidance": model.guidance,
        "runs": runs, "tuned": tuned(),
    }  # fmt: skip
    spread = {name: Times(tuple(each)) for name, each in times.items()}
    return Figures(machine(), program, load, first, memory=memory(), **spread)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, when it is there, and after how many seconds."""
    began = time.perf_counter()
    made = jax.block_until_ready(call())
    return made, time.perf_counter() - began


def tuned() -> dict[str, int] | None:
    """In which numbers the kernels differ from the package's on this machine (`sfumato bench --tune`), None if it was
    not tuned."""
    table = measured()
    if table is None:
        return None
    return {name: number for name, number in dc.asdict(table).items() if number != getattr(usual(), name)}


def memory() -> dict[str, int]:
    """The most bytes that this process has had, and those of devices with memory of their own."""
    found: dict[str, int] = {}
    if sys.platform != "win32":  # Windows has no such module
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found["process"] = most if sys.platform == "darwin" else most * 1024
    for device in jax.devices():
        stats = device.memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            found[str(device)] = stats["peak_bytes_in_use"]
    return found
