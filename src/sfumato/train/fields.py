"""Dataclasses of settings: what their fields take, as text on a command line and as JSON."""

from __future__ import annotations

import dataclasses as dc
import difflib
import functools
import json
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sfumato.errors import SfumatoError
from sfumato.sizes import parse_size

Size = tuple[int, int]
"""Width and height in pixels; "512x512" on a command line."""
Names = tuple[str, ...]
"""A flag that may be repeated."""
Options = Mapping[str, Any]
"""A flag NAME=VALUE that may be repeated; a value is read as JSON, and otherwise as text."""

NEEDED: Any = dc.MISSING
"""In place of a default: the user has to say it."""


def setting(default: Any, help: str, *, flag: str | None = None, metavar: str | None = None, free: bool = False) -> Any:
    """A field with what `--help` says of it, and its `flag` if that is not its name.

    `free` marks what may be another when a run is gone on with: it changes no step.
    """
    known = {"help": help, "flag": flag, "metavar": metavar, "free": free}
    if isinstance(default, dict):
        return dc.field(default_factory=lambda: dict(default), metadata=known)
    return dc.field(metadata=known) if default is NEEDED else dc.field(default=default, metadata=known)


@dc.dataclass(frozen=True)
class Kind:
    """What a field takes."""

    type: Any
    """str, int, float, bool, `Size`, `Names` or `Options`."""
    optional: bool
    choices: tuple[str, ...] = ()

    @property
    def repeated(self) -> bool:
        """Whether its flag may be repeated."""
        return self.type in (Names, Options)

    @property
    def words(self) -> str:
        """What it takes, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return WORDS[self.type]

    def read(self, value: Any, what: str) -> Any:
        """A value of a JSON file. Raises SfumatoError, which names `what`, for one that does not fit."""
        if value is None and self.optional:
            return None
        good = _converted(value, self.type)
        if good is None or (self.choices and good not in self.choices):
            raise SfumatoError(f"{what} is {self.words}, not {value!r}.")
        return good

    def parse(self, value: Any, what: str) -> Any:
        """What the command line has read. Raises as `read`."""
        if self.type == Size:
            value = parse_size(str(value)) or value
        elif self.type == Options:
            value = dict(_pair(text, what) for text in value)
        return self.read(list(value) if self.type == Names else value, what)

    def told(self, value: Any) -> list[str]:
        """The value as a command line has it; one text for each time that the flag is there."""
        if self.type == Names:
            return list(value)
        if self.type == Options:
            return [f"{key}={one if _plain(one) else json.dumps(one)}" for key, one in value.items()]
        return ["{}x{}".format(*value) if self.type == Size else str(value)]


WORDS: Mapping[Any, str] = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", Size: "a size such as 512x512",
    Names: "a list of texts", Options: "settings such as b1=0.9",
}  # fmt: skip


def _converted(value: Any, kind: Any) -> Any:
    """The value as the kind has it, None if it does not fit."""
    if kind == Size:
        fits = isinstance(value, list | tuple) and len(value) == 2 and all(_converted(one, int) for one in value)
        return tuple(value) if fits else None
    if kind == Names:
        fits = isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
        return tuple(value) if fits else None
    if kind == Options:
        return dict(value) if isinstance(value, Mapping) and all(isinstance(key, str) for key in value) else None
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    return value if type(value) is kind else None


def _pair(text: str, what: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise SfumatoError(f"{what} takes NAME=VALUE, such as b1=0.9, not {text!r}.")
    try:
        return key.strip(), json.loads(value, parse_constant=str)
    except ValueError:
        return key.strip(), value.strip()


def _plain(value: Any) -> bool:
    """Whether a text is read back as itself without quotes."""
    return isinstance(value, str) and _pair(f"x={value}", "") == ("x", value)


@functools.cache
def kinds(cls: type) -> dict[str, Kind]:
    """What the fields of a dataclass take."""
    hints = typing.get_type_hints(cls)
    return {field.name: _kind(hints[field.name]) for field in dc.fields(cls)}


def _kind(hint: Any) -> Kind:
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    if type(None) in typing.get_args(hint):
        return dc.replace(_kind(parts[0]), optional=True)
    if typing.get_origin(hint) is typing.Literal:
        return Kind(str, False, tuple(parts))
    return Kind(hint, False)


def default_of(field: dc.Field[Any]) -> Any:
    """A field's default; `NEEDED` if it has none."""
    return field.default_factory() if field.default_factory is not dc.MISSING else field.default


def from_json(cls: Any, raw: Any, where: str) -> Any:
    """A dataclass of settings from a JSON object. Raises SfumatoError for keys and values that it does not have."""
    if not isinstance(raw, Mapping):
        raise SfumatoError(f"{where} is an object with settings, not {raw!r:.60}.")
    known = kinds(cls)
    for key in raw:
        if key not in known:
            raise SfumatoError(f"{where} has no setting {key!r}; {nearest(key, known)}")
    missing = [field.name for field in dc.fields(cls) if default_of(field) is NEEDED and field.name not in raw]
    if missing:
        raise SfumatoError(f"{where} needs {' and '.join(map(repr, missing))}.")
    return cls(**{key: known[key].read(value, f"{where}.{key}") for key, value in raw.items()})


def to_json(settings: Any) -> dict[str, Any]:
    """All settings of a dataclass, as JSON has them."""
    values = {field.name: getattr(settings, field.name) for field in dc.fields(settings)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def nearest(name: Any, names: Iterable[str]) -> str:
    """The end of a sentence: what of `names` may have been meant, or else all of them."""
    known: Sequence[str] = list(names)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}."
