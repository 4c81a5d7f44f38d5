"""Annotators: from a picture to a picture that a ControlNet is steered by. One a file; a file's function is its
annotator, its first line of documentation the description, its keyword arguments the options."""

from __future__ import annotations

import dataclasses as dc
import difflib
import functools
import importlib
import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from sfumato.errors import SfumatoError
from sfumato.image import read

NAMES = ("canny", "scribble", "sketch", "regions", "grayscale")
"""The annotators; each is a function in the module of its name."""


@dc.dataclass(frozen=True)
class Range:
    """The numbers that an option takes, ends included: `Annotated[int, Range(0, 255)]`."""

    low: float | int = -math.inf
    high: float | int = math.inf


@dc.dataclass(frozen=True)
class Option:
    """A setting of an annotator."""

    name: str
    kind: type
    """int, float, bool or str."""
    default: Any
    range: Range = Range()
    choices: tuple[str, ...] = ()

    def check(self, value: Any, where: str) -> Any:
        """The value in the option's type; text is read as a number first. Raises SfumatoError, which names `where`,
        for one that does not fit."""
        try:
            good = self._convert(value)
        except (TypeError, ValueError, OverflowError):
            good = None
        if isinstance(good, int | float) and not isinstance(good, bool):
            fits = math.isfinite(good) and self.range.low <= good <= self.range.high
        else:
            fits = good is not None and (not self.choices or good in self.choices)
        if not fits:
            raise SfumatoError(f"{where}: {self.name} is {self.wanted()}, not {value!r}.")
        return good

    def _convert(self, value: Any) -> Any:
        if self.kind is bool:
            known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            return known.get(str(value).lower())
        if self.kind is str:
            return value if isinstance(value, str) else None
        if isinstance(value, bool):
            return None
        number = self.kind(value)
        return number if isinstance(value, str) or number == value else None

    def wanted(self) -> str:
        """What the option takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind is bool:
            return "true or false"
        if self.kind is str:
            return "a text"
        noun, low, high = {int: "a whole number", float: "a number"}[self.kind], self.range.low, self.range.high
        if math.isinf(high):
            return noun if math.isinf(low) else f"{noun} from {low:g} on"
        return f"{noun} from {low:g} to {high:g}"


@dc.dataclass(frozen=True)
class Annotator:
    """An annotator's name, description and options."""

    name: str
    description: str
    options: Mapping[str, Option]
    function: Callable[..., Image.Image] = dc.field(repr=False)


def annotators() -> dict[str, Annotator]:
    """All annotators by name, each with a `description` of one line and its `options` with their defaults."""
    return {name: _annotator(name) for name in NAMES}


@functools.cache
def _annotator(name: str) -> Annotator:
    function = getattr(importlib.import_module(f"sfumato.annotators.{name}"), name)
    hints, options = typing.get_type_hints(function, include_extras=True), {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        kind, extras = hints[parameter.name], ()
        if typing.get_origin(kind) is typing.Annotated:
            kind, *extras = typing.get_args(kind)
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        bounds = next((extra for extra in extras if isinstance(extra, Range)), Range())
        options[parameter.name] = Option(parameter.name, str if choices else kind, parameter.default, bounds, choices)
    description = (inspect.getdoc(function) or "").split("\n")[0]
    return Annotator(name, description, options, function)


def annotate(name: str, image: Any, /, **options: Any) -> Image.Image:
    """The control picture (RGB, as large as the picture) that the annotator `name` makes.

    `image` is a path, a PIL picture, an array or the bytes of a file, as `sfumato.image.read` takes them. Raises
    SfumatoError for an annotator, an option or a value that does not exist, and as `read`.
    """
    if name not in NAMES:
        raise SfumatoError(f"There is no annotator {name!r}; {_nearest(name, NAMES)}")
    annotator = _annotator(name)
    for option in options:
        if option not in annotator.options:
            raise SfumatoError(
                f"The annotator {name} has no option {option!r}; {_nearest(option, [*annotator.options])}"
            )
    values = {key: annotator.options[key].check(value, f"The annotator {name}") for key, value in options.items()}
    return annotator.function(read(image), **values)


def _nearest(name: str, names: Sequence[str]) -> str:
    """The end of a sentence: what of `names` may have been meant, or else all of them."""
    near = difflib.get_close_matches(str(name), names, n=3)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"there is {', '.join(names)}." if names else "it has none."
