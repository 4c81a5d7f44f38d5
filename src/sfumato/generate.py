"""`generate`: the straight line from a prompt to pictures."""

from __future__ import annotations

import dataclasses as dc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sfumato import compiler, run
from sfumato import noise as noises
from sfumato.branches import all_branches, check_together
from sfumato.cache import enable_cache
from sfumato.controls import CFG, Control, Request
from sfumato.controls.check import finite, pictures
from sfumato.errors import SfumatoError
from sfumato.images import Images, Picture
from sfumato.io.family import Purpose, purpose_of
from sfumato.model import Model
from sfumato.plan import Plan, make_plan
from sfumato.record import record
from sfumato.sample import initial, sample, sample_rows
from sfumato.samplers import sampler as sampler_of
from sfumato.samplers.base import Sampler, Table
from sfumato.types import Conditioning

Progress = Callable[[int, int, Any], Any]


FILLED_BY = {
    Purpose.INPAINT: "Inpaint(image, mask)", Purpose.DEPTH: "Depth(depth)", Purpose.EDIT: "InstructPix2Pix(image)",
}  # fmt: skip
"""The control that fills the further input channels of a model."""


class Cancelled(Exception):
    """The progress callback of a run returned False."""


def generate(
    model: Model, prompt: str | Sequence[str], *, negative: str | Sequence[str] | None = None,
    controls: Sequence[Control] | None = None, sampler: str | Sampler | None = None, steps: int | None = None,
    size: tuple[int, int] | None = None, count: int = 1, seed: int | Sequence[int] = 0, image: Any = None,
    strength: float = 0.8, start: float = 0.0, stop: float = 1.0, latents: Any = None, noise: Any = None,
    weights: bool = True, clip_skip: int = 0, tiled: bool | None = None, batch: int | None = None,
    devices: Sequence[Any] | None = None, progress: Progress | None = None, output: str = "images",
) -> Any:  # fmt: skip
    """Makes pictures.

    `prompt` is one text or a list of them, each drawn `count` times; `negative` likewise, None for none. `controls`
    are the techniques to apply together, None for plain guidance and () for none at all. `sampler` is a name (see
    `sfumato samplers`), a Sampler, or None for the checkpoint's own; None for `steps` is the number that
    the model was made for (`Model.steps`), and for `size`, (width, height) in pixels, the model's own. `seed` is that
    of the first picture and the others follow, or a list with one for each: a picture depends on its own seed alone.

    `image` (one, or one for each) is what to start from instead of noise, changed by `strength` in [0, 1]. `start` and
    `stop` run a part of the process, in shares of the training time: a base model up to 0.8 with output="latents",
    then its refiner from 0.8 on with these `latents`. Without `start`, `latents` [B, h, w, C] is unit-variance noise to
    start from; `noise` [rows, B, h, w, C] is the noise of every row of a stochastic sampler.

    `weights=False` reads prompts literally; `clip_skip` leaves out that many more of the text encoder's last layers.
    `tiled` passes the autoencoder tile by tile (None: only large pictures), `batch` bounds how many pictures are made
    at once, `devices` (None: all) share them. `progress(row, rows, preview)` is called after every row, where
    `preview` is the latents, and cancels by returning False.

    Returns Images, or latents [B, h, w, C] as the UNet sees them for output="latents". Raises SfumatoError for what
    does not fit, before anything is compiled, and Cancelled.
    """
    enable_cache()
    check_model("generate", model)
    plan = make_plan(model, prompt, negative, count, seed, size)
    chosen = sampler_of(sampler, model.schedule)
    controls = checked_controls(controls, model)
    steps = model.steps if steps is None else steps
    start, stop = _share(start, stop, latents, image)
    check_choices(output, batch, devices)
    strength = finite("strength", strength, 0, 1)
    table = run.rows(model, chosen, steps, strength=None if image is None else strength, start=start, stop=stop)
    row_noise = _given("noise", noise, (len(table.steps.index), len(plan), *plan.latent_shape))
    first_noise = _given("latents", latents, (len(plan), *plan.latent_shape))
    starts = None if image is None else pictures("image", image, len(plan), plan.size, signed=True)

    job = prepare_job(
        model, plan, chosen, table, controls, None if start > 0 else first_noise, weights=weights, clip_skip=clip_skip,
        tiled=tiled, devices=devices, progress=progress,
    )  # fmt: skip
    job = dc.replace(job, row_noise=row_noise, starts=starts)
    job = job if start == 0 else dc.replace(job, latents=first_noise, handed_over=True)
    made = job.rounds(batch, output)
    if output == "latents":
        return made
    for control in controls:
        made = control.finish(made)
    facts = record(model, plan, chosen, steps, controls, None if image is None else strength, clip_skip)
    return Images([Picture(array, fact) for array, fact in zip(made, facts, strict=True)])


def prepare_job(
    model: Model, plan: Plan, sampler: Sampler, table: Table, controls: Sequence[Control], noise: Any, *,
    weights: bool, clip_skip: int, tiled: bool | None, devices: Sequence[Any] | None, progress: Progress | None,
) -> Job:  # fmt: skip
    """The job of a plan, which starts from `noise` [B, h, w, C], None for that of the seeds. Everything is checked.

    Raises SfumatoError for what does not fit, before anything is compiled.
    """
    tiled = run.tiling(plan.latent_shape, tiled)
    read = run.reader(
        model, plan, [text for control in controls for text in control.texts()], weights=weights, clip_skip=clip_skip
    )

    def prepare(noise: Float[Array, "B h w C"]) -> tuple[tuple[Control, ...], dict[str, Conditioning]]:
        base = run.conditionings(plan, read)
        return _prepared(model, plan, controls, base, noise, tiled, read), base

    # On shapes alone, so that whatever does not fit is said before anything is compiled.
    shapes = jax.ShapeDtypeStruct((len(plan), *plan.latent_shape), jnp.float32)
    jax.eval_shape(lambda noise: (prepare(noise), None)[1], shapes)
    noise = noises.starting(plan.seeds, plan.latent_shape) if noise is None else noise
    return Job(model, plan, sampler, table, *prepare(noise), noise, tiled, devices, progress)


def _prepared(
    model: Model, plan: Plan, controls: Sequence[Control], base: Mapping[str, Conditioning], noise: Any, tiled: bool,
    read: run.Reader,
) -> tuple[Control, ...]:  # fmt: skip
    """The controls for all pictures of a run, each checked, and all together."""
    request = Request(
        model, plan.prompts, [text or "" for text in plan.negatives], plan.size, noise, read.weights, read,
        lambda pixels: run.encode_image(model.vae, pixels, tiled),
    )  # fmt: skip
    prepared = tuple(control.prepare(request) for control in controls)
    check_together(controls, prepared)
    all_branches(prepared, base)
    _check_channels(model, prepared)
    return prepared


@dc.dataclass(frozen=True)
class Job:
    """Pictures to be made at once. Arrays have the pictures as first axis."""

    model: Model
    plan: Plan
    sampler: Sampler
    table: Table
    controls: tuple[Control, ...]
    base: Mapping[str, Conditioning]
    latents: Any
    """Noise to start from, or what another run has handed over."""
    tiled: bool
    devices: Sequence[Any] | None
    progress: Progress | None
    row_noise: Any = None
    """[rows, B, h, w, C], None for that of the seeds."""
    starts: Any = None
    """Pixels to start from, or None."""
    handed_over: bool = False

    def part(self, picked: Sequence[int]) -> Job:
        """The job for some of the pictures."""
        if list(picked) == list(range(len(self.plan))):
            return self
        chosen = np.array(picked)
        return dc.replace(
            self, plan=self.plan.part(picked), controls=tuple(control.part(picked) for control in self.controls),
            base=jax.tree.map(lambda a: a[chosen], self.base), latents=self.latents[chosen],
            row_noise=None if self.row_noise is None else self.row_noise[:, chosen],
            starts=None if self.starts is None else self.starts[chosen],
        )  # fmt: skip

    def rounds(self, batch: int | None, output: str) -> Any:
        """As a call, `batch` pictures at most at once."""
        rounds = self.plan.parts(batch, len(self.devices) if self.devices is not None else len(jax.devices()))
        done = [self.part(picked)(output)[:wanted] for picked, wanted in rounds]
        return jnp.concatenate(done) if output == "latents" else np.concatenate(done)

    def __call__(self, output: str) -> Any:
        """The pictures uint8 [B, H, W, 3], or their latents."""
        model, plan, steps = self.model, self.plan, self.table.steps
        row_noise = self.row_noise
        if self.sampler.stochastic and row_noise is None:
            row_noise = noises.per_step(plan.seeds, len(steps.index), plan.latent_shape)
        rows = run.columns(self.table, row_noise if self.sampler.stochastic else None)
        clean = None if self.starts is None else run.encode_image(model.vae, self.starts, self.tiled)
        first = int(np.argmax(steps.active))
        x = self.latents if self.handed_over else initial(rows, self.latents, clean, self.table.start_sigma, first)
        mesh = run.mesh_of(self.devices, len(plan))
        decoder = model.vae, jax.ShapeDtypeStruct(x.shape, jnp.float32), self.tiled, mesh
        ready = functools.partial(run.decode.prepare, *decoder) if output != "latents" and mesh is None else _nothing
        # A large program is compiled while the sampler works, so that what compiling leaves in memory is used again.
        decoded = ready() if compiler.is_light(jax.tree.leaves(model.vae)) else None
        x = jnp.array(x) if self.progress is None else x  # `sample` takes it over
        arguments = (
            run.spread(mesh, model.unet, None), self.sampler, rows, self.controls, run.spread(mesh, x),
            run.spread(mesh, self.base), model.schedule.prediction_type, mesh,
        )  # fmt: skip
        x = sample(*arguments) if self.progress is None else self._watched(arguments, self.progress, ready)
        if output == "latents":
            return x
        (decoded or ready())()
        return np.asarray(run.decode(run.spread(mesh, model.vae, None), x, self.tiled, mesh))

    def _watched(
        self, arguments: tuple[Any, ...], progress: Progress, ready: Callable[[], Any]
    ) -> Float[Array, "B h w C"]:
        total = int(np.sum(self.table.steps.active))
        x = arguments[4]
        for done, x in enumerate(sample_rows(*arguments), start=1):
            if done == 1:
                ready()
            x.block_until_ready()  # jax runs ahead, and a row is done when its numbers are there
            if progress(done, total, x) is False:
                raise Cancelled(f"Cancelled after row {done} of {total}.")
        return x


def _nothing() -> Callable[[], None]:
    return lambda: None


def check_model(what: str, model: Any) -> None:
    """Raises SfumatoError for what is no model."""
    if not isinstance(model, Model):
        raise SfumatoError(f"{what} takes a model as sfumato.load returns it, not a {type(model).__name__}.")


def checked_controls(controls: Any, model: Model) -> tuple[Control, ...]:
    """The controls, plain guidance as the model likes it for None. Raises SfumatoError for what is none."""
    if controls is None:
        return (CFG.of(model),)
    if not isinstance(controls, Sequence) or isinstance(controls, str):
        kind = type(controls).__name__
        raise SfumatoError(f"controls takes a list of controls, such as [sfumato.CFG(5)], not a {kind}.")
    for control in controls:
        if not isinstance(control, Control):
            raise SfumatoError(f"controls holds a {type(control).__name__}, which is no control; see sfumato.CFG.")
    return tuple(controls)


def _share(start: Any, stop: Any, latents: Any, image: Any) -> tuple[float, float]:
    """`start` and `stop`. Raises SfumatoError for no part of the process, and for arguments that contradict it."""
    start, stop = (finite(what, value, 0, 1) for what, value in (("start", start), ("stop", stop)))
    if start >= stop:
        raise SfumatoError(f"start {start:g} must come before stop {stop:g}.")
    if start > 0 and image is not None:
        raise SfumatoError("start and image both say where to begin; give one of them.")
    if start > 0 and latents is None:
        raise SfumatoError("start picks up a process that is under way: give its latents (output='latents') as well.")
    return start, stop


def check_choices(output: Any, batch: Any, devices: Any) -> None:
    """Raises SfumatoError for what these arguments do not take."""
    if output not in ("images", "latents"):
        raise SfumatoError(f"output is 'images' or 'latents', not {output!r}.")
    if batch is not None and (not isinstance(batch, int) or isinstance(batch, bool) or batch < 1):
        raise SfumatoError(f"batch must be a whole number from 1 on, not {batch!r}.")
    if devices is not None and not len(devices):
        raise SfumatoError("devices is an empty list; give at least one, or None for all.")


def _check_channels(model: Model, controls: Sequence[Control]) -> None:
    """Raises SfumatoError if nothing fills the network's extra input channels."""
    inputs, latents = model.unet.config.in_channels, model.vae.config.latent_channels
    extra, purpose = inputs - latents, purpose_of(inputs, latents)
    if extra and not any(control.sets_channels for control in controls):
        hint = FILLED_BY.get(purpose) if purpose else None
        raise SfumatoError(
            f"{model.name or 'The model'} has {extra} input channels beside the latents, which no control fills"
            + (f"; add {hint}." if hint else ".")
        )


def _given(what: str, value: Any, shape: tuple[int, ...]) -> Any:
    """The array float32; SfumatoError unless it has this shape and finite numbers."""
    if value is None:
        return None
    try:
        array = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise SfumatoError(f"{what} must be an array of numbers, not a {type(value).__name__}.") from None
    if array.shape != shape:
        raise SfumatoError(f"{what} must have the shape {shape}, not {array.shape}.")
    if not np.isfinite(array).all():
        raise SfumatoError(f"{what} holds numbers that are not finite.")
    return jnp.asarray(array)
