"""Dataclasses that are trees."""

from __future__ import annotations

import dataclasses as dc
import itertools
from typing import Any

import jax
import pytest

import sfumato.controls  # noqa: F401
from sfumato.controls.base import Control
from sfumato.types import pytree, static


@pytree
class One:
    x: float
    way: str = static(default="a")
    y: float = 2.0


@pytree
class Other:
    x: float
    way: str = static(default="a")
    y: float = 2.0


@pytree
class Derived(One):
    pass


def test_fields_are_leaves_by_name_unless_they_are_static():
    leaves, tree = jax.tree_util.tree_flatten_with_path(One(1.0, "b"))
    assert [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves] == [(".x", 1.0), (".y", 2.0)]
    assert jax.tree.unflatten(tree, [3, 4]) == One(3, "b", 4)
    assert jax.tree.leaves(One(1.0)) == [1.0, 2.0]


def test_what_is_static_is_part_of_the_structure():
    assert jax.tree.structure(One(1.0)) == jax.tree.structure(One(5.0))
    assert jax.tree.structure(One(1.0)) != jax.tree.structure(One(1.0, "b"))


@pytest.mark.parametrize("other", [Other, Derived])
def test_classes_of_the_same_fields_have_other_structures(other):
    """Otherwise jax takes a program of the one for the other, if their hashes begin alike."""
    assert jax.tree.structure(One(1.0)) != jax.tree.structure(other(1.0))


def test_so_have_all_controls():
    """Those that are trees: others become one when they are prepared."""
    trees = [tree for kind in subclasses(Control) if not jax.tree_util.treedef_is_leaf(tree := structure(kind))]
    assert len(trees) > 8
    assert all(one != other for one, other in itertools.combinations(trees, 2))


def subclasses(kind: type) -> list[type]:
    """Of the package."""
    found = [each for each in kind.__subclasses__() if each.__module__.startswith("sfumato.")]
    return [one for each in found for one in (each, *subclasses(each))]


def structure(kind: type) -> Any:
    """With a number in each field."""
    value = object.__new__(kind)
    for field in dc.fields(kind):
        object.__setattr__(value, field.name, 0.0)
    return jax.tree.structure(value)


def test_a_program_is_of_its_class():
    """One of sixty was another's, where structures were equal and hashes differed."""
    for number in range(200):
        one, other = (pytree(type(f"Kind{number}", (), {"__annotations__": {"x": float}})) for _ in range(2))
        run = jax.jit(lambda value, one=one: value.x + (1 if type(value) is one else 2))
        assert (run(one(0.0)), run(other(0.0))) == (1.0, 2.0)
