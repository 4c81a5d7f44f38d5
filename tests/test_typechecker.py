"""Types are checked in every test, if sparingly."""

from __future__ import annotations

import dataclasses as dc

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

import typechecker
from sfumato.models.kernels import twice
from sfumato.types import Step


@pytest.mark.parametrize("test", ["one", "the next"])
def test_the_first_calls_of_a_function_are_checked_in_each_test(test):
    x = jnp.ones((1, 3, 4))  # without channels
    for _ in range(typechecker.FEW):
        with pytest.raises(TypeCheckError, match="'x'"):
            twice(x)
    assert twice(x).shape == (1, 6, 8)


def test_what_a_dataclass_is_made_of_is_checked():
    with pytest.raises(TypeCheckError):
        Step(**dict.fromkeys((field.name for field in dc.fields(Step)), "no array"))
