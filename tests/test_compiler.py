"""The compiler is told what suits a program, and nothing that it does not know."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato import compiler
from sfumato.kept import Kept
from sfumato.sample import _whole


@pytest.fixture(autouse=True)
def anew():
    compiler._known.cache_clear()
    yield
    compiler._known.cache_clear()


@pytest.mark.parametrize(("light", "want"), [(True, compiler.LATE | compiler.OWN_PRODUCTS), (False, compiler.LATE)])
def test_this_compiler_knows_all_of_them(light, want):
    assert compiler.options(light, platform="cpu") == want


def test_training_sums_by_another_library():
    own = compiler.options(light=True, told=compiler.BARRIERS, own=compiler.OWN_BUT_SUMS, platform="cpu")
    assert own == compiler.BARRIERS | compiler.OWN_BUT_SUMS
    assert compiler.options(told=compiler.BARRIERS, own=compiler.OWN_BUT_SUMS, platform="cpu") == compiler.BARRIERS


def test_what_a_compiler_does_not_know_is_left_out():
    unknown = {"xla_there_is_no_such_option": "1"}
    assert compiler.options(told=unknown, platform="cpu") is None
    assert compiler.options(told=unknown | compiler.BARRIERS, platform="cpu") == compiler.BARRIERS


def test_other_devices_are_told_nothing(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler.options(light=True) is None
    assert compiler.options(platform="cpu") == compiler.LATE


def test_the_numbers_of_all_arrays_count(monkeypatch):
    monkeypatch.setattr(compiler, "LIGHT", 12)
    leaves = [jnp.zeros((2, 3)), np.zeros(5), "a sampler", jax.ShapeDtypeStruct((), jnp.float32)]
    assert not compiler.is_light(leaves)
    assert compiler.is_light(leaves[:3])


def test_a_program_of_few_numbers_is_another_one(monkeypatch):
    monkeypatch.setattr(compiler, "LIGHT", 6)
    program = Kept(lambda x: x @ x.T, top=True)
    few, many = (program.way(jnp.zeros((1, size))) for size in (5, 6))
    assert few is not many
    assert few is program.way(jnp.zeros((5, 1)))
    for way, size in ((few, 5), (many, 6)):
        assert float(way(jnp.ones((1, size)))[0, 0]) == size


def test_the_embedded_model_counts_as_light():
    model = sfumato.load("emoji")
    assert compiler.is_light(jax.tree.leaves((model.unet, model.vae)))
    assert _whole.top


def test_without_them_a_picture_is_drawn_all_the_same(models, monkeypatch):
    model = models("sd1")
    want = sfumato.generate(model, "a fox", steps=2, seed=0)[0].array.astype(int)
    monkeypatch.setattr(compiler, "LIGHT", 0)
    got = sfumato.generate(model, "a fox", steps=2, seed=0)[0].array.astype(int)
    np.testing.assert_allclose(got, want, atol=2)
