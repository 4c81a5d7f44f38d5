"""The settings of a run, in groups: what flags, configuration files and the Python interface are made of.

Nothing here starts a device or needs more than the standard library, so that `--help` is quick.
"""

from __future__ import annotations

import dataclasses as dc
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import FileError, SfumatoError
from sfumato.train.fields import NEEDED, Kind, default_of, from_json, kinds, nearest, to_json
from sfumato.train.groups import GROUPS, PANELS, Data, Objective, Optimizer, Parallel, Run, Samples, Start
from sfumato.train.own import RECIPES, Recipe


@dc.dataclass(frozen=True)
class Settings:
    """All settings of a run. What is None in them and has a default in the recipe gets it."""

    recipe: Recipe
    model: Start
    data: Data
    run: Run
    objective: Objective = dc.field(default_factory=Objective)
    optimizer: Optimizer = dc.field(default_factory=Optimizer)
    parallel: Parallel = dc.field(default_factory=Parallel)
    samples: Samples = dc.field(default_factory=Samples)

    def __post_init__(self) -> None:
        for place, value in self.recipe.defaults().items():
            group, _, name = place.partition(".")
            if getattr(getattr(self, group), name) is None:
                object.__setattr__(self, group, dc.replace(getattr(self, group), **{name: value}))
        for group, name in self.recipe.hidden(GROUPS):
            known = next(field for field in dc.fields(GROUPS[group]) if field.name == name)
            if getattr(getattr(self, group), name) != default_of(known):
                raise SfumatoError(f"The recipe {self.recipe.name} has no setting {name!r} of the group {group!r}.")

    def flags(self) -> Iterator[Flag]:
        """The flags of the recipe."""
        return flags(type(self.recipe))

    def get(self, flag: Flag) -> Any:
        """The value of a flag."""
        return getattr(getattr(self, flag.group), flag.field.name)

    def to_json(self) -> dict[str, Any]:
        """All settings, as a configuration file has them."""
        hidden = set(self.recipe.hidden(GROUPS))
        groups = {
            group: {name: value for name, value in to_json(getattr(self, group)).items() if (group, name) not in hidden}
            for group in GROUPS
        }
        own = {"name": self.recipe.name, **to_json(self.recipe)}
        return {"recipe": own, **{name: values for name, values in groups.items() if values}}

    @classmethod
    def from_json(cls, raw: Any, where: str = "The configuration") -> Settings:
        """The settings of a configuration file. Raises SfumatoError for what does not fit, naming it."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("recipe"), Mapping):
            raise SfumatoError(f"{where} is no configuration of a training: it has no recipe.")
        own = dict(raw["recipe"])
        name = own.pop("name", None)
        if name not in RECIPES:
            raise SfumatoError(f"{where} has no recipe {name!r}; {nearest(name, RECIPES)}")
        for group in raw:
            if group not in (*GROUPS, "recipe", "versions"):
                raise SfumatoError(f"{where} has no group {group!r}; {nearest(group, GROUPS)}")
        groups = {
            group: from_json(kind, raw.get(group, {}), f"{where}: {group}")
            for group, kind in GROUPS.items()
            if group in raw or group in ("model", "data", "run")
        }
        return cls(from_json(RECIPES[name], own, f"{where}: recipe"), **groups)

    @classmethod
    def read(cls, path: str | Path) -> Settings:
        """The settings of a file. Raises FileError if it cannot be read, and as `from_json`."""
        return cls.from_json(read_config(path), str(path))

    def with_flags(self, given: Mapping[str, Any]) -> Settings:
        """With other values of some flags, by their keys."""
        return assembled(type(self.recipe), {flag.key: self.get(flag) for flag in self.flags()} | dict(given))

    def command(self) -> str:
        """The command line that says the same."""
        words = ["sfumato", "train", self.recipe.name]
        for flag in self.flags():
            value = self.get(flag)
            if value == flag.default or value is None:
                continue
            if flag.kind.type is bool:
                words.append(flag.name if value else f"--no-{flag.name[2:]}")
            else:
                words += [word for text in flag.kind.told(value) for word in (flag.name, text)]
        return shlex.join(words)

    def changed(self, before: Settings) -> tuple[Flag, Any, Any] | None:
        """The first setting that is another than `before` and would change the run, with both values."""
        if type(self.recipe) is not type(before.recipe):
            raise SfumatoError(f"The run was one of the recipe {before.recipe.name}, and this is {self.recipe.name}.")
        for flag in self.flags():
            if not flag.field.metadata["free"] and before.get(flag) != self.get(flag):
                return flag, before.get(flag), self.get(flag)
        return None


@dc.dataclass(frozen=True)
class Flag:
    """A flag of the command line."""

    group: str
    field: dc.Field[Any]
    kind: Kind
    default: Any

    @property
    def key(self) -> str:
        return f"{self.group}__{self.field.name}"

    @property
    def names(self) -> list[str]:
        """Its names; a yes-or-no has a second one for no."""
        names = (self.field.metadata["flag"] or f"--{self.field.name.replace('_', '-')}").split(",")
        return [f"{name}/--no-{name[2:]}" if self.kind.type is bool else name for name in names]

    @property
    def name(self) -> str:
        """The first long one."""
        return next(name for name in self.names if name.startswith("--")).partition("/")[0]

    def shown(self, value: Any) -> str:
        """A value in a message."""
        if value is None or self.kind.type is bool:
            return {None: "none", True: "on", False: "off"}[value]
        return " ".join(self.kind.told(value)) or "none"


def flags(recipe: type[Recipe]) -> Iterator[Flag]:
    """The flags of a recipe's command."""
    hidden = set(recipe.hidden(GROUPS))
    for group in PANELS:
        kind = recipe if group == "recipe" else GROUPS[group]
        for field in dc.fields(kind):
            if (group, field.name) not in hidden:
                default = recipe.usual.get(f"{group}.{field.name}", default_of(field))
                yield Flag(group, field, kinds(kind)[field.name], default)


def assembled(recipe: type[Recipe], given: Mapping[str, Any]) -> Settings:
    """Settings out of values by the keys of flags; the others have their defaults. Raises SfumatoError if one is
    missing that is needed."""
    values: dict[str, dict[str, Any]] = {group: {} for group in PANELS}
    for flag in flags(recipe):
        if flag.key in given:
            values[flag.group][flag.field.name] = given[flag.key]
        elif default_of(flag.field) is NEEDED:
            raise SfumatoError(
                f"{flag.name} is needed: {flag.field.metadata['help'][:1].lower()}{flag.field.metadata['help'][1:]}"
            )
    own = recipe(**values.pop("recipe"))
    return Settings(own, **{group: GROUPS[group](**each) for group, each in values.items()})


def read_config(path: str | Path) -> Any:
    """The JSON of a configuration file. Raises FileError if it is not there, or no JSON."""
    try:
        return json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise FileError(f"The configuration {path} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:
        raise FileError(f"The configuration {path} is not JSON ({error}).") from None
