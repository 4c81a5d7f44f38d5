"""`run`: a training as its settings say, from the model to the exported weights and the model card."""

from __future__ import annotations

import contextlib
import dataclasses as dc
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import typer
from jax.sharding import Mesh

from sfumato.cache import enable_cache
from sfumato.errors import FileError, SfumatoError
from sfumato.io.load import blank, default_dtype, load
from sfumato.io.save import put_in_place
from sfumato.model import Model
from sfumato.schedule import Schedule
from sfumato.train import card, optimizers, shard
from sfumato.train.fit import Result, fit
from sfumato.train.journal import Journal, read_history, write, write_json
from sfumato.train.objective import Objective
from sfumato.train.own import DreamBooth
from sfumato.train.samples import Sampling
from sfumato.train.settings import Settings
from sfumato.train.supply import Cut, Supply, supply
from sfumato.train.task import Task

CONFIG, FINAL = "config.json", "final"


@dc.dataclass(frozen=True)
class Outcome:
    """What a run has left."""

    out: Path
    result: Result
    final: Path | None
    """The exported weights; None if the run was stopped before its last step."""
    stopped: bool
    """True if SIGINT or SIGTERM came before the last step. The same settings go on from there."""


def tell(line: str) -> None:
    """Says it on standard error."""
    typer.echo(line, err=True)


def run(settings: Settings, *, say: Callable[[str], None] = tell) -> Outcome:
    """Trains what the settings say, into the folder `run.out`:

    config.json (all settings and the versions), metrics.jsonl, checkpoints/, samples/ with contact sheets, final/ with
    the exported weights (their moving averages if there are any), README.md (the model card), and for some settings
    cache/, class/ and tensorboard/. A run that was broken off there goes on, with the same losses.

    `say` is called with what there is to tell. Raises SfumatoError for settings that do not fit, and as `fit`.
    """
    began, settings = time.monotonic(), _connected(settings)
    say = say if jax.process_index() == 0 and not settings.run.quiet else lambda line: None
    out, mesh = Path(settings.run.out).expanduser(), _mesh(settings)
    # What does not fit is said before anything is loaded.
    _check_batch(settings, mesh.size)
    wishes, optimizer, resumed = _wishes(settings), _optimizer(settings), _check_resumed(settings, out)
    _objective(settings, Schedule(prediction_type="sample"))  # the one that takes all settings
    model = _model(settings)
    task = settings.recipe.task(
        model, _objective(settings, model.schedule), seed=settings.run.seed, dtype=settings.run.dtype,
        remat=settings.run.remat, cached=settings.data.cached is not None,
    )  # fmt: skip
    if jax.process_index() == 0:
        write_json(out / CONFIG, settings.to_json() | {"versions": card.versions()})
    cut, journal = Cut(len(model.text_encoders)), Journal(out, settings, task, wishes, mesh.size, began)
    with contextlib.closing(supply(settings, model, out, cut, say)) as data:
        if not resumed:
            journal.draw(0, task.trainable)
        result = _fit(settings, task, data, optimizer, mesh, out, cut, journal)
        journal.write(result.step)
        trained = result.trainable if result.ema is None else result.ema
        if not result.stopped and jax.process_index() == 0:
            trained = settings.recipe.finished(model, trained, data.data)
    _tell(data, cut, say)
    if result.stopped:
        say(f"Stopped after step {result.step} of {settings.optimizer.steps}; to go on: {again(out)}")
        return Outcome(out, result, None, True)
    if journal.drawn != result.step:
        journal.draw(result.step, trained)
    if jax.process_index() == 0:
        export(task, trained, out / FINAL)
        facts = card.Facts(settings, out, model, data.count, len(data.skipped), result, mesh, read_history(out))
        write(out / "README.md", card.card(facts))
    return Outcome(out, result, out / FINAL, False)


def _connected(settings: Settings) -> Settings:
    """Finds the other processes and the devices; the settings with the type that these compute in."""
    processes = settings.parallel
    if any(value is not None for value in (processes.coordinator, processes.processes, processes.process)):
        shard.connect(processes.coordinator, processes.processes, processes.process)
    if jax.process_count() == 1:
        enable_cache()
    return dc.replace(settings, run=dc.replace(settings.run, dtype=settings.run.dtype or default_dtype()))


def again(out: Path) -> str:
    """The command that goes on with the run in a folder."""
    return shlex.join(["sfumato", "train", "--config", str(out / CONFIG)])


def _fit(
    settings: Settings, task: Task, data: Supply, optimizer: tuple[Any, Any], mesh: Mesh, out: Path, cut: Cut,
    journal: Journal,
) -> Result:  # fmt: skip
    chosen, how = settings.optimizer, settings.run

    def collate(batch: Mapping[str, Any]) -> dict[str, Any]:
        return cut(lambda: task.collate(batch), len(batch["index"]))

    return fit(
        task.loss, task.trainable, data.data, optimizer[0], rates=optimizer[1], frozen=task.frozen, collate=collate,
        steps=chosen.steps or 0, seed=how.seed, accumulate=chosen.accumulate, clip=chosen.clip or None,
        ema=chosen.ema or None, mesh=mesh, fsdp=settings.parallel.fsdp, folder=out, save_every=how.save_every,
        keep=how.keep, best=how.best, resume=how.resume, on_step=journal, tensorboard=how.tensorboard, quiet=how.quiet,
    )  # fmt: skip


def _mesh(settings: Settings) -> Mesh:
    """The devices that are asked for, as many of each process."""
    wanted, processes, known = settings.parallel.devices, jax.process_count(), jax.devices()
    if wanted is None:
        return shard.mesh_of()
    if wanted < 1 or wanted % processes:
        raise SfumatoError(f"--devices is a number that {processes} processes share evenly, not {wanted}.")
    own = [[device for device in known if device.process_index == index] for index in range(processes)]
    if wanted > len(known) or min(map(len, own)) < wanted // processes:
        raise SfumatoError(f"There are {len(known)} devices in {processes} processes, and --devices asks for {wanted}.")
    return shard.mesh_of([device for each in own for device in each[: wanted // processes]])


def _check_batch(settings: Settings, devices: int) -> None:
    """Raises SfumatoError for a batch that devices and parts cannot share."""
    batch, parts, own = settings.data.batch, settings.optimizer.accumulate, settings.recipe
    twice = isinstance(own, DreamBooth) and own.class_prompt is not None  # as many pictures of the class come to it
    unit = math.lcm(jax.process_count(), parts * devices // math.gcd(parts * devices, 2 if twice else 1))
    if batch < 1 or batch % unit:
        over = f"{devices} devices" + (f" in {parts} parts" if parts > 1 else "")
        raise SfumatoError(
            f"A batch of {batch} cannot be divided over {over}; make --batch a multiple of {unit}"
            f"{', or use fewer --devices' if devices > 1 else ''}."
        )


def _objective(settings: Settings, schedule: Schedule) -> Objective | None:
    """What is minimised; None for a recipe that has a loss of its own."""
    if "objective" in settings.recipe.without:
        return None
    wanted = settings.objective
    return Objective(
        schedule, min_snr=wanted.min_snr, snr_floor=wanted.snr_floor, offset=wanted.offset,
        dropout=wanted.dropout or 0.0, stratified=wanted.stratified, **settings.recipe.objective(),
    )  # fmt: skip


def _optimizer(settings: Settings) -> tuple[Any, Any]:
    """The optimizer, and the learning rates to be told."""
    chosen, rate = settings.optimizer, settings.optimizer.learning_rate or 0.0
    how: dict[str, Any] = {
        "steps": chosen.steps or 0, "schedule": chosen.schedule, "warmup": chosen.warmup, "rates_by": chosen.rates_by,
        "schedule_options": _options(chosen.schedule_options),
    }  # fmt: skip
    made = optimizers.optimizer(chosen.name, rate, options=_options(chosen.options), **how)
    return made, optimizers.rates_of(rate, **how)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as optax takes them: JSON has no numbers for keys, as boundaries of a schedule are."""

    def keyed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {int(key) if key.lstrip("-").isdigit() else key: keyed(one) for key, one in value.items()}

    return {key: keyed(value) for key, value in options.items()}


def _wishes(settings: Settings) -> Sampling | None:
    """The sample pictures, checked; None for none."""
    wanted, prompts = settings.samples, list(settings.samples.prompts)
    if wanted.every < 1:
        raise SfumatoError(f"--sample-every is a whole number from 1 on, not {wanted.every}.")
    if wanted.prompts_file is not None:
        try:
            lines = Path(wanted.prompts_file).read_text("utf-8").splitlines()
            prompts += [line.strip() for line in lines if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"The prompts in {wanted.prompts_file} cannot be read ({error}).") from None
    if not prompts and not wanted.pictures:
        return None
    wishes = Sampling(
        tuple(prompts), wanted.pictures, negative=wanted.negative, steps=wanted.steps, guidance=wanted.guidance,
        sampler=wanted.sampler, size=wanted.size or settings.data.size, seed=wanted.seed,
    )  # fmt: skip
    wishes.check(**settings.recipe.draws)
    return wishes


def _model(settings: Settings) -> Model:
    start, dtype = settings.model, settings.recipe.loaded_in(settings.run.dtype or "float32")
    if start.blank:
        if start.vae or start.revision or start.variant:
            raise SfumatoError(
                "--blank takes configurations alone, so there is no --vae, --revision or --variant beside it."
            )
        model = blank(start.source, seed=settings.run.seed, dtype=dtype)
    else:
        model = load(start.source, dtype=dtype, revision=start.revision, variant=start.variant, vae=start.vae)
    wanted = settings.objective.prediction_type
    return model if wanted is None else dc.replace(model, schedule=dc.replace(model.schedule, prediction_type=wanted))


def _check_resumed(settings: Settings, out: Path) -> bool:
    """Whether there is a run in `out` to go on with. Raises SfumatoError if it is another one, naming what differs."""
    there = [path for path in (out / "checkpoints").glob("*") if path.name.isdigit()]
    if not there:
        return False
    if not settings.run.resume:
        raise SfumatoError(f"{out} has checkpoints of an earlier run; name another --out, or go on with it (--resume).")
    if not (out / CONFIG).is_file():
        raise SfumatoError(f"{out} has checkpoints and no {CONFIG}, so it is unclear of what run; name another --out.")
    changed = settings.changed(Settings.read(out / CONFIG))
    if changed is not None:
        flag, before, now = changed
        raise SfumatoError(
            f"The run in {out} was begun with {flag.name} {flag.shown(before)}, and this one has {flag.shown(now)}: "
            "leave that as it was, or name another --out."
        )
    return True


def _tell(data: Supply, cut: Cut, say: Callable[[str], None]) -> None:
    """Says what was left out."""
    if data.skipped:
        name, why = next(iter(data.skipped.items()))
        say(f"{len(data.skipped)} pictures cannot be read and were left out, such as {name}: {why}")
    if cut.texts:
        say(f"{cut.texts} of {cut.seen} texts were longer than the text encoder reads, and were cut off.")


def export(task: Task, trained: Any, folder: Path) -> None:
    """Writes the weights; the folder appears, or takes the place of an older one, when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        task.export(trained, temporary / folder.name)
        put_in_place(temporary / folder.name, folder)
    except OSError as error:
        raise SfumatoError(f"{folder} cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
