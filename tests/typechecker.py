"""How the tests check types: an int will do where a float is asked for, as PEP 484 has it, and of the thousands of
calls of a function in a test the first few are checked."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))

FEW = 5
"""Calls of one function that are checked in each test. All of them took half of the time of the samplers' tests."""
_calls: dict[Callable[..., Any], int] = {}


def sparing(decorator: Callable[..., Any]) -> Callable[..., Any]:
    """jaxtyping's decorator, which leaves a function alone once `FEW` of its calls were checked."""

    def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
        def decorate(fn: Any) -> Any:
            if inspect.isfunction(fn):
                return _at_first(decorator(fn, typechecker=typechecker), fn)
            plain = vars(fn).get("__init__") if inspect.isclass(fn) else None
            decorated = decorator(fn, typechecker=typechecker)
            if plain and decorated.__init__ is not plain:  # of a dataclass
                decorated.__init__ = _at_first(decorated.__init__, plain)
            return decorated

        return decorate

    return jaxtyped


def _at_first(always: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, for whose first calls `always` stands in."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        count = _calls.get(fn, 0)
        if count >= FEW:
            return fn(*args, **kwargs)
        _calls[fn] = count + 1
        return always(*args, **kwargs)

    return call


def begin() -> None:
    """A test begins: everything is checked again."""
    _calls.clear()
