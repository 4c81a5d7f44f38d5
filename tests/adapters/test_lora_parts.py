"""The tensors of one layer, by what they are called and how large they are."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest

from sfumato.adapters.delta import Delta, LowRank
from sfumato.adapters.lora_parts import LAYOUTS, alpha, delta, rank, roles
from sfumato.io.lazy import LazyTensor

SIZES = {"O": 6, "I": 8, "R": 3, "S": 2, "A": 2, "B": 3, "C": 4, "D": 2, "k": 3, "l": 3}


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(np.ones(shape, np.float32)) for name, shape in shapes.items()}


@pytest.mark.parametrize(("name", "role"), [
    ("lora_down.weight", "down"), ("lora.down.weight", "down"), ("lora_linear_layer.down.weight", "down"),
    ("down.weight", "down"), ("down", "down"), ("lora_A.weight", "down"), ("lora_A.default.weight", "down"),
    ("lora_up.weight", "up"), ("lora_B.style_2.weight", "up"), ("lora_mid.weight", "mid"), ("alpha", "alpha"),
    ("dora_scale", "magnitude"), ("lora.dora_scale", "magnitude"), ("lora_magnitude_vector", "magnitude"),
    ("lora_magnitude_vector.default.weight", "magnitude"), ("hada_w1_a", "hada_w1_a"), ("hada_t2", "hada_t2"),
    ("lokr_w2", "lokr_w2"), ("lokr_w1_b", "lokr_w1_b"), ("diff", "diff"), ("diff_b", "bias"), ("w_norm", "diff"),
    ("b_norm", "bias"),
])  # fmt: skip
def test_roles(name: str, role: str) -> None:
    assert list(roles(tensors({name: () if role == "alpha" else (4, 4)}))) == [role]


@pytest.mark.parametrize("name", ["lora_B.bias", "lora_A.default.bias", "lora_C.weight", "lora_down", "hada_w3_a", "x"])
def test_names_without_a_role(name: str) -> None:
    found = roles(tensors({"lora_up.weight": (4, 4), name: (4, 4)}))
    assert found == f"its tensor {name} is of no known kind" or (name == "lora_down" and "down" in found)


def test_two_tensors_of_one_role() -> None:
    assert roles(tensors({"lora_A.weight": (1, 2), "lora_down.weight": (1, 2)})) == "it has two tensors for lora_down"


def test_peft_keeps_one_magnitude_for_each_output() -> None:
    """Even where the shape looks like that of the inputs."""
    found = roles(tensors({"lora_magnitude_vector": (1, 5, 1, 1), "lora_A.weight": (2, 5, 3, 3)}))
    assert isinstance(found, dict)
    assert found["magnitude"].shape == found["magnitude"].read().shape == (5,)
    kept = roles(tensors({"dora_scale": (1, 5, 1, 1)}))
    assert isinstance(kept, dict)
    assert kept["magnitude"].shape == (1, 5, 1, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout[0].__name__} {' '.join(layout[1])}")
def test_layouts(layout: tuple[type[Delta], Mapping[str, str]]) -> None:
    """Shapes that agree make a change, which has the numbers of the tensors; any other size does not."""
    kind, axes = layout

    def shape(letters: str) -> tuple[int, ...]:
        return tuple(n for letter in letters.split() for n in ([3, 3] if letter == "*" else [1, 1] if letter == "+"
                                                               else [SIZES[letter]]))  # fmt: skip

    shapes = {role: shape(letters) for role, letters in axes.items()}
    made = delta(tensors(shapes), 0.5)
    assert type(made) is kind
    assert isinstance(made, Delta)
    assert np.isfinite(np.asarray(made.weight())).all()
    for role, letters in axes.items():
        for axis, letter in enumerate(letters.split()):
            shared = letter == "+" or (letter != "*" and sum(letter in other.split() for other in axes.values()) > 1)
            if shared or letters.split().count(letter) > 1:
                wrong = (*shape(letters)[:axis], 7, *shape(letters)[axis + 1 :])
                assert "do not fit each other" in str(delta(tensors(shapes | {role: wrong}), 0.5))
        assert "do not fit each other" in str(delta(tensors(shapes | {role: ()}), 0.5)) or letters == "*"


@pytest.mark.parametrize(("shapes", "words"), [
    ({"down": (2, 4)}, "it has lora_down and no lora_up"),
    ({"down": (2, 4), "mid": (2, 2, 3, 3)}, "it has lora_down and lora_mid and no lora_up"),
    ({"hada_w1_a": (4, 2), "hada_w1_b": (2, 4), "hada_w2_a": (4, 2)}, "and no hada_w2_b"),
    ({"lokr_w1": (2, 2)}, "it has lokr_w1 and no lokr_w2"),
    ({"down": (2, 4), "up": (4, 2), "diff": (4, 4)}, "it has diff beside lora_down and lora_up"),
    ({"magnitude": (4,)}, "it has an alpha and no matrices"),
])  # fmt: skip
def test_what_is_missing(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    assert words in str(delta(tensors(shapes), 1.0))


def test_numbers_are_not_read_before_they_are_needed() -> None:
    array = np.ones((4, 4), np.float32)
    made = delta({"down": LazyTensor.of(array), "up": LazyTensor.of(array)}, 0.5)
    assert isinstance(made, LowRank)
    assert made.down is array


def test_ranks_and_alphas() -> None:
    assert rank(tensors({"down": (2, 4), "up": (4, 2)})) == 2
    assert rank(tensors({"hada_w1_a": (4, 3), "hada_w1_b": (3, 4)})) == 3
    assert rank(tensors({"lokr_w1": (2, 2), "lokr_w2_b": (5, 2)})) == 5
    assert rank(tensors({"lokr_w1_b": (5, 2), "lokr_w2": (2, 2)})) == 5
    assert rank(tensors({"diff": (4, 4)})) is None
    assert alpha({}) is None
    assert alpha(tensors({"alpha": ()})) == alpha(tensors({"alpha": (1, 1)})) == 1
    assert math.isnan(alpha(tensors({"alpha": (2,)})) or 0)
