"""DreamBooth (arXiv:2208.12242): a few pictures of a subject, and others of its class to keep what is known of it."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sfumato.controls.check import finite
from sfumato.errors import SfumatoError
from sfumato.generate import generate
from sfumato.image import FORMATS
from sfumato.model import Model
from sfumato.train.objective import Objective
from sfumato.train.recipes.lora import lora
from sfumato.train.recipes.text_to_image import text_to_image
from sfumato.train.task import Batch, Task


def dreambooth(
    model: Model, objective: Objective | None = None, *, prompt: str | None = None, class_prompt: str | None = None,
    prior_weight: float = 1.0, text: bool = False, rank: int | None = None, alpha: float | None = None,
    targets: str | Sequence[str] = "attention", seed: int = 0, dtype: str | None = None, remat: bool = False,
    cached: bool = False,
) -> Task:  # fmt: skip
    """Trains the UNet, with `text` the text encoders too, or with a `rank` a LoRA of them.

    `prompt` ("a photo of sks dog") is what all pictures of the subject are called, None for their own captions, and
    `class_prompt` ("a photo of a dog") the same for those of the class, which come from `WithPrior`: the loss is the
    mean over the subject's pictures plus `prior_weight` times the mean over the class's (eq. 2). Without any it is the
    plain loss. What is `cached` without `text` has its captions in it: those of `named(batch, prompt, None)` for the
    subject, and of `named(batch, class_prompt, None)` for the class. The rest, and what is exported, is as in
    `text_to_image` and `lora`, whose errors it raises.
    """
    prior_weight = finite("prior_weight", prior_weight, 0)
    if rank is None:
        train = ("unet", *model.text_encoders) if text else ("unet",)
        task = text_to_image(model, objective, train=train, dtype=dtype, remat=remat, cached=cached)
    else:
        task = lora(
            model, objective, rank=rank, alpha=alpha, targets=targets, text=text, seed=seed, dtype=dtype, remat=remat,
            cached=cached,
        )  # fmt: skip

    def collate(batch: Batch) -> dict[str, Any]:
        return task.collate(named(weighted(batch, prior_weight), prompt, class_prompt))

    return dc.replace(task, collate=collate)


def weighted(batch: Batch, prior_weight: float) -> dict[str, Any]:
    """The batch with "weights" under which the mean over all rows is the loss with prior preservation."""
    if "prior" not in batch:
        return dict(batch)
    prior = np.asarray(batch["prior"], bool)
    if prior.all():
        raise SfumatoError("This batch holds pictures of the class alone, and none of the subject.")
    shares = np.where(prior, prior_weight / max(prior.sum(), 1), 1 / (~prior).sum())
    return {**batch, "weights": (len(prior) * shares).astype(np.float32)}


def named(batch: Batch, prompt: str | None, class_prompt: str | None) -> dict[str, Any]:
    """The batch with these captions where there are any."""
    count = len(shown(batch))
    prior, own = batch.get("prior", np.zeros(count, bool)), batch.get("text", [None] * count)
    texts = [class_prompt if of_class else prompt for of_class in prior]
    texts = [mine if text is None else text for text, mine in zip(texts, own, strict=True)]
    return {**batch, "text": texts} if None not in texts else dict(batch)


def shown(batch: Batch) -> Any:
    """The pictures of a batch, or their latents if it is cached."""
    return batch["latents"] if "latents" in batch else batch["pixels"]


class WithPrior:
    """Batches of the subject, each joined with one of the class, whose rows "prior" marks. Where there are as many of
    both they alternate, so that all processes together have the same rows in the same order as one alone.

    Both are endless iterators of batches with `get_state` and `set_state`, whose pictures have the same size; either
    both are cached or none is.
    """

    def __init__(self, subject: Any, classes: Any):
        self.subject, self.classes = subject, classes

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        first, second = next(self.subject), next(self.classes)
        if ("latents" in first) != ("latents" in second):
            raise SfumatoError(
                "Pictures of the subject and of the class must be cached both, and here only one kind is."
            )
        sizes = [shown(batch).shape[1:3] for batch in (first, second)]
        if sizes[0] != sizes[1]:
            raise SfumatoError(
                "Pictures of the subject and of the class must have one size, not {1} x {0} and {3} x {2}.".format(
                    *sizes[0], *sizes[1]
                )
            )
        prior = np.repeat([False, True], [len(shown(first)), len(shown(second))])
        if len(shown(first)) == len(shown(second)):
            prior = np.tile([False, True], len(shown(first)))
        order = np.argsort(np.argsort(prior, kind="stable"))
        both = {name: _joined(first[name], second[name], order) for name in first if name in second}
        return both | {"prior": prior}

    def get_state(self) -> dict[str, Any]:
        """Where both stand, as JSON."""
        return {"subject": self.subject.get_state(), "classes": self.classes.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self.subject.set_state(state["subject"])
        self.classes.set_state(state["classes"])


def _joined(first: Any, second: Any, order: Int[np.ndarray, " B"]) -> Any:
    """The rows of both, number i being that of `order[i]` in the one after the other."""
    if isinstance(first, list):
        return [[*first, *second][place] for place in order]
    return np.concatenate([first, second])[order]


def class_pictures(
    model: Model, class_prompt: str, folder: str | Path, count: int, *, batch: int = 4, seed: int = 0, **settings: Any
) -> list[Path]:
    """Fills a folder with pictures of the class up to `count`, and returns all that are in it.

    They are drawn by `generate` with `settings`, `batch` at once, and written as they come, so that what was broken off
    is gone on with. The n-th has the seed `seed` + n. Raises SfumatoError as `generate`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own = [folder / f"{number:05}.png" for number in range(count)]
    there = _pictures(folder)
    missing = [number for number, file in enumerate(own) if file not in there][: max(count - len(there), 0)]
    for at in range(0, len(missing), batch):
        numbers = missing[at : at + batch]
        made = generate(model, class_prompt, count=len(numbers), seed=[seed + number for number in numbers], **settings)
        for number, picture in zip(numbers, made, strict=True):
            picture.save(own[number])
    return _pictures(folder)


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in FORMATS)
