"""What a run's settings say of its data, as what `fit` reads."""

from __future__ import annotations

import dataclasses as dc
import functools
import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.experimental import multihost_utils

from sfumato.controls import CFG
from sfumato.errors import SfumatoError
from sfumato.image import check_size
from sfumato.model import Model
from sfumato.plan import make_plan
from sfumato.text.tokenizer import TruncationWarning
from sfumato.train.buckets import buckets
from sfumato.train.cached import with_cache
from sfumato.train.data import Batches, examples
from sfumato.train.denoising import cache
from sfumato.train.own import DreamBooth, InstructPix2Pix, Recipe
from sfumato.train.recipes.dreambooth import WithPrior, class_pictures, named
from sfumato.train.settings import Settings

T = TypeVar("T")


@dc.dataclass
class Cut:
    """Counts texts that are longer than the text encoder reads, instead of warning of each."""

    encoders: int
    texts: int = 0
    seen: int = 0

    def __call__(self, call: Callable[[], T], texts: int = 0) -> T:
        """Runs `call`, which reads so many texts."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TruncationWarning)
            result = call()
        for warning in caught:
            if not issubclass(warning.category, TruncationWarning):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        # Each text encoder warns of a text.
        self.texts += sum(issubclass(one.category, TruncationWarning) for one in caught) // max(self.encoders, 1)
        self.seen += texts
        return result


@dc.dataclass
class Supply:
    """The data of a run."""

    data: Any
    """What `fit` reads."""
    batches: list[Batches]
    """Which that is made of."""
    count: int | None
    """How many examples there are; None for a stream."""

    @property
    def skipped(self) -> dict[str, str]:
        """Pictures that were left out, and why."""
        return {name: why for one in self.batches for name, why in one.skipped.items()}

    def close(self) -> None:
        """Ends all threads and processes."""
        for one in self.batches:
            one.close()


def supply(settings: Settings, model: Model, out: Path, cut: Cut, say: Callable[[str], None]) -> Supply:
    """The data that the settings name. Raises SfumatoError and FileError for what does not fit or cannot be read."""
    data, own = settings.data, settings.recipe
    found = examples(
        data.source, text=data.text, image_column=data.image_column, text_column=data.text_column,
        conditioning_column=data.conditioning_column, split=data.split, streaming=data.streaming, **data.options,
    )  # fmt: skip
    size = data.size or make_plan(model, "", None, 1, 0, None).size
    count = len(found) if hasattr(found, "__len__") else None
    batches = [_batches(settings, found, size)]
    caches = [_cache(own, model)]
    if isinstance(own, DreamBooth) and own.class_prompt is not None:
        if data.buckets:
            raise SfumatoError("Pictures of the subject and of the class have one size, so here are no --buckets.")
        folder = _classes(own, settings, model, size, out, say)
        batches.append(_batches(settings, examples(folder, text=own.class_prompt), size))
        caches.append(functools.partial(cache, model, reads=own.reads))
    if data.cached is not None:
        if data.flip or data.crop:
            raise SfumatoError("What is cached stays as it is, so there is no --flip and no --crop beside --cached.")
        for one, make, name in zip(batches, caches, ("examples", "class"), strict=False):
            folder = cache_folder(settings, out) / name if data.cached == "disk" else None
            with_cache(
                one, lambda batch, make=make: cut(lambda: make(batch)), folder, data.batch, quiet=settings.run.quiet,
                shard=(jax.process_index(), jax.process_count()),
            )  # fmt: skip
        together("cached")
    return Supply(WithPrior(*batches) if len(batches) > 1 else batches[0], batches, count)


def _cache(own: Recipe, model: Model) -> Callable[[Any], Any]:
    """What makes of a batch the one that is trained on."""
    if isinstance(own, DreamBooth):
        return lambda batch: cache(model, named(batch, own.prompt, None), reads=own.reads)
    return functools.partial(cache, model, reads=own.reads, edits=isinstance(own, InstructPix2Pix))


def _batches(settings: Settings, found: Any, size: tuple[int, int]) -> Batches:
    data = settings.data
    check_size(size, 8, "What is trained on")
    return Batches(
        found, batch=data.batch // jax.process_count(), size=buckets(size, step=data.bucket_step) if data.buckets
        else size, seed=settings.run.seed, flip=data.flip, crop=data.crop, zoom=data.zoom, annotator=data.control,
        annotator_options=data.control_options, shard=(jax.process_index(), jax.process_count()),
        skip_broken=data.skip_broken, threads=data.threads, workers=data.workers, window=data.window,
    )  # fmt: skip


def _classes(
    own: DreamBooth, settings: Settings, model: Model, size: tuple[int, int], out: Path, say: Callable[[str], None]
) -> str | Path:
    """The folder with pictures of the class, drawn if there is none."""
    if own.class_data is not None:
        return own.class_data
    if own.class_prompt is not None and jax.process_index() == 0:
        say(f"Drawing {own.class_count} pictures of the class into {out / 'class'}")
        class_pictures(
            model, own.class_prompt, out / "class", own.class_count, seed=settings.run.seed, steps=own.class_steps,
            controls=[CFG(own.class_guidance)], size=size, devices=jax.local_devices(),
        )  # fmt: skip
    together("class")
    return out / "class"


def together(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def cache_folder(settings: Settings, out: Path) -> Path:
    """Where this run's examples are cached: another folder for whatever makes other rows."""
    told = settings.to_json()
    changing = ("threads", "workers", "window", "batch", "skip_broken")
    data = {key: value for key, value in told["data"].items() if key not in changing}
    made_by = [told["recipe"], told["model"], data, settings.run.seed, settings.run.dtype]
    return out / "cache" / hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:12]
