"""What a call of `generate` asks for, checked and spelled out picture by picture."""

from __future__ import annotations

import dataclasses as dc
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sfumato import noise as noises
from sfumato.errors import SfumatoError
from sfumato.image import check_size
from sfumato.model import Model


@dc.dataclass(frozen=True)
class Plan:
    """The pictures of a run."""

    prompts: tuple[str, ...]
    negatives: tuple[str | None, ...]
    seeds: tuple[int, ...]
    size: tuple[int, int]
    """Width and height in pixels."""
    latent_shape: tuple[int, int, int]
    """Height, width and channels of the latents of one picture."""

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, chosen: Sequence[int]) -> Plan:
        """The plan of some of the pictures."""

        def pick(values: tuple[Any, ...]) -> tuple[Any, ...]:
            return tuple(values[index] for index in chosen)

        return dc.replace(self, prompts=pick(self.prompts), negatives=pick(self.negatives), seeds=pick(self.seeds))

    def parts(self, batch: int | None, devices: int) -> Iterator[tuple[list[int], int]]:
        """The pictures of each round, `batch` at most, and how many of them count: the rest fills up the devices."""
        most = min(batch or len(self), len(self))
        devices = max(1, min(devices, most))
        whole = math.ceil(most / devices) * devices
        for first in range(0, len(self), most):
            chosen = list(range(first, min(first + most, len(self))))
            yield chosen + [chosen[-1]] * (whole - len(chosen)), len(chosen)


def make_plan(model: Model, prompt: Any, negative: Any, count: Any, seed: Any, size: Any) -> Plan:
    """The plan of a call. Raises SfumatoError for what does not fit."""
    prompts = _texts("prompt", prompt)
    if not prompts:
        raise SfumatoError("There is no prompt; give a text, which may be empty, or a list of at least one.")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise SfumatoError(f"count must be a whole number from 1 on, not {count!r}.")
    negatives: list[str | None] = [None] if negative is None else list(_texts("negative", negative))
    if len(negatives) not in (1, len(prompts)):
        raise SfumatoError(
            f"There are {len(prompts)} prompts and {len(negatives)} negative ones; give one, or as many."
        )
    negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
    prompts = [text for text in prompts for _ in range(count)]
    negatives = [text for text in negatives for _ in range(count)]
    size = size_of(model, size)
    factor = model.vae.factor
    shape = (size[1] // factor, size[0] // factor, model.vae.config.latent_channels)
    return Plan(tuple(prompts), tuple(negatives), _seeds(seed, len(prompts)), size, shape)


def _texts(what: str, value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise SfumatoError(f"{what} must be a text or a list of texts, not {value!r}.")
    return list(texts)


def _seeds(seed: Any, pictures: int) -> tuple[int, ...]:
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        if len(seed) != pictures:
            raise SfumatoError(f"There are {len(seed)} seeds for {pictures} pictures; give one number, or {pictures}.")
        return tuple(noises.checked(list(seed)))
    (first,) = noises.checked([seed])
    return tuple(noises.checked(range(first, first + pictures)))


def size_of(model: Model, size: Any = None) -> tuple[int, int]:
    """Width and height in pixels: the wanted ones, or those that the model was trained at. Raises SfumatoError for a
    size that latents cannot have."""
    if size is None:
        native = model.unet.config.sample_size or 64
        height, width = native if isinstance(native, tuple) else (native, native)
        size = (width * model.vae.factor, height * model.vae.factor)
    return check_size(size, model.vae.factor, "The picture")
