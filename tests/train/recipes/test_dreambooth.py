"""DreamBooth: the same step as diffusers', pictures of the class, batches of both kinds."""

from __future__ import annotations

import dataclasses as dc
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.errors import SfumatoError
from sfumato.model import Model
from sfumato.train.denoising import cache
from sfumato.train.objective import Draws
from sfumato.train.recipes.dreambooth import WithPrior, class_pictures, dreambooth, named, shown, weighted

from training import Reference, assert_parity, batch, draws, our_step, step

SUBJECT, CLASS = "a photo of sks dog", "a photo of a dog"


class Data:
    """Endless batches that count."""

    def __init__(self, rows: int, size: int = 16):
        self.rows, self.size, self.number = rows, size, 0

    def __next__(self) -> dict[str, Any]:
        self.number += 1
        data = batch(10 * self.rows + self.number, self.rows)
        return data | {"pixels": data["pixels"][:, : self.size]}

    def get_state(self) -> dict[str, Any]:
        return {"number": self.number}

    def set_state(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Cached:
    """Batches of which all is worked out that does not change."""

    def __init__(self, model: Model, prompt: str, data: Data):
        self.model, self.prompt, self.data = model, prompt, data

    def __next__(self) -> dict[str, Any]:
        return cache(self.model, named(next(self.data), self.prompt, None))


def part(drawn: Draws, rows: slice) -> Draws:
    return jax.tree.map(lambda a: a[rows], drawn)


def theirs(reference: Reference, data: dict[str, Any], drawn: Draws, weight: float, first: int) -> Any:
    """The loss of the reference's script: the mean over the subject's rows and `weight` times that over the others."""
    own, other = slice(None, first), slice(first, None)
    data = data | {"text": [SUBJECT] * first + [CLASS] * (len(data["text"]) - first)}
    halves = [{name: value[rows] for name, value in data.items()} for rows in (own, other)]
    losses = [reference.loss(half, part(drawn, rows)) for half, rows in zip(halves, (own, other), strict=True)]
    return losses[0] + weight * losses[1]


@pytest.mark.slow
@pytest.mark.parity
def test_five_steps_are_those_of_the_reference(pair):
    both, batches, names = pair("sd1", small=True), WithPrior(Data(2), Data(1)), ["unet", "text_encoder"]
    task = dreambooth(both.model, prompt=SUBJECT, class_prompt=CLASS, prior_weight=0.3, text=True)
    assert task.trainable.keys() == set(names)
    assert dreambooth(both.model).trainable.keys() == {"unet"}
    reference = Reference(both.pipeline, {name: getattr(both.pipeline, name) for name in names})
    loss = functools.partial(theirs, reference, weight=0.3, first=2)
    assert_parity(task, reference, draws(5), [next(batches) for _ in range(5)], loss)


@pytest.mark.slow
@pytest.mark.parity
def test_a_step_of_a_lora_has_the_same_loss(pair):
    both, drawn = pair("sd1", small=True), draws()
    data = next(WithPrior(Data(1), Data(2)))
    task = dreambooth(both.model, prompt=SUBJECT, class_prompt=CLASS, prior_weight=2.0, rank=4, text=True)
    assert {side for layers in task.trainable.values() for pair in layers.values() for side in pair} == {"down", "up"}
    loss = theirs(Reference(both.pipeline, {}), data, drawn[0], 2.0, 1).detach()
    assert step(task, task.trainable, data, drawn[0])[0] == pytest.approx(float(loss), rel=1e-4)


# Weights and captions


def test_weights_make_the_sum_of_two_means():
    rows, prior = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), np.array([False, False, True, True, True])
    weights = weighted({"prior": prior}, 0.5)["weights"]
    assert (weights * rows).mean() == pytest.approx(rows[:2].mean() + 0.5 * rows[2:].mean())
    assert weighted({"prior": prior}, 0)["weights"].tolist() == [2.5, 2.5, 0, 0, 0]
    assert weighted({"prior": np.zeros(3, bool)}, 0.5)["weights"].tolist() == [1, 1, 1]
    assert weighted({"text": []}, 1) == {"text": []}
    with pytest.raises(SfumatoError, match="none of the subject"):
        weighted({"prior": np.ones(2, bool)}, 1)


def test_captions(loaded):
    model, data = loaded("sd1"), next(WithPrior(Data(2), Data(1)))

    def ids(data: Any, **settings: Any) -> list[list[int]]:
        return dreambooth(model, **settings).collate(data)["tokens"]["text_encoder"].tolist()

    def of(*texts: str) -> list[list[int]]:
        return model.tokenizers["tokenizer"](texts).tolist()

    own = data["text"]
    assert ids(data) == of(*own)
    assert ids(data, prompt=SUBJECT) == of(SUBJECT, SUBJECT, own[2])
    assert ids(data, prompt=SUBJECT, class_prompt=CLASS) == of(SUBJECT, SUBJECT, CLASS)
    assert ids({"pixels": data["pixels"]}, prompt=SUBJECT) == of(SUBJECT, SUBJECT, SUBJECT)
    with pytest.raises(SfumatoError, match="text"):
        ids({"pixels": data["pixels"]})
    with pytest.raises(SfumatoError, match="prior_weight"):
        dreambooth(model, prior_weight=-1)


# Data


def test_batches_of_both_kinds():
    both = WithPrior(Data(2), Data(1))
    first = next(both)
    assert first["prior"].tolist() == [False, False, True]
    assert first["text"] == batch(21, 2)["text"] + batch(11, 1)["text"]
    np.testing.assert_array_equal(first["pixels"], np.concatenate([batch(21, 2)["pixels"], batch(11, 1)["pixels"]]))
    assert iter(both) is both


def test_as_many_of_both_kinds_alternate():
    """So that the rows of two processes, one after another, are those of one."""
    data = next(WithPrior(Data(2), Data(2)))
    assert data["prior"].tolist() == [False, True, False, True]
    own, other = batch(21, 2), batch(21, 2)
    assert data["text"] == [own["text"][0], other["text"][0], own["text"][1], other["text"][1]]
    np.testing.assert_array_equal(data["pixels"][::2], own["pixels"])


def test_batches_go_on_from_a_state():
    both, other = WithPrior(Data(2), Data(1)), WithPrior(Data(2), Data(1))
    next(both)
    other.set_state(both.get_state())
    np.testing.assert_array_equal(next(both)["pixels"], next(other)["pixels"])


@pytest.mark.slow
def test_cached_batches_give_the_same_loss(models):
    model, (drawn,) = models("sd1"), draws(dropped=(True, False, False))
    drawn = dc.replace(drawn, posterior=jnp.zeros_like(drawn.posterior))  # the mean, as cached
    settings = {"prompt": SUBJECT, "class_prompt": CLASS, "prior_weight": 0.3}
    plain, cached = dreambooth(model, **settings), dreambooth(model, **settings, cached=True)
    assert cached.frozen.keys() == {"blank"}
    assert dreambooth(model, **settings, cached=True, rank=2).frozen.keys() == {"blank", "unet"}
    kept = next(WithPrior(Cached(model, SUBJECT, Data(2)), Cached(model, CLASS, Data(1))))
    assert shown(kept).shape == (3, 8, 8, 4)
    wanted = our_step(plain, [drawn], gradients=False)(plain.trainable, next(WithPrior(Data(2), Data(1))))
    ours = our_step(cached, [drawn], gradients=False)(plain.trainable, kept)
    assert float(ours) == pytest.approx(float(wanted), rel=1e-5)


def test_what_cannot_be_cached():
    halves: list[dict[str, Any]] = [{"latents": np.zeros((1, 8, 8, 4)), "text": [""]}, next(Data(1))]
    with pytest.raises(SfumatoError, match="only one kind"):
        next(WithPrior(*map(iter, zip(halves, strict=True))))


@pytest.mark.parametrize("rank", [None, 2])
def test_text_encoders_are_trained_on_cached_latents_and_captions_that_are_read(loaded, rank):
    task = dreambooth(loaded("sd1"), text=True, cached=True, rank=rank)
    assert task.frozen.keys() == (set() if rank is None else {"unet", "text_encoder"})


def test_pictures_of_two_sizes():
    with pytest.raises(SfumatoError, match="one size, not 16 x 16 and 16 x 8"):
        next(WithPrior(Data(2), Data(1, 8)))


def test_the_loop_takes_them_and_goes_on(loaded, tmp_path):
    """With a loss of the pictures and their weights alone, which compiles quickly."""
    import optax

    from sfumato.train.fit import fit

    task = dreambooth(loaded("sd1"), prompt=SUBJECT, class_prompt=CLASS, rank=2)

    def loss(factors: Any, frozen: Any, rows: Any, key: Any) -> Any:
        shade = (rows["pixels"].mean((1, 2, 3)) * rows["weights"]).mean()
        return jnp.square(1 + shade) * sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(factors)), {}

    def run(steps: int, folder: Any) -> Any:
        return fit(
            loss, task.trainable, WithPrior(Data(2), Data(1)), optax.sgd(1e-2), collate=task.collate, steps=steps,
            folder=folder, quiet=True,
        )  # fmt: skip

    run(2, tmp_path / "a")
    got, want = run(3, tmp_path / "a"), run(3, tmp_path / "b")
    assert got.metrics["loss"] == want.metrics["loss"]
    jax.tree.map(np.testing.assert_array_equal, got.trainable, want.trainable)
    assert jax.tree.structure(got.trainable) == jax.tree.structure(task.trainable)


@pytest.mark.slow
def test_pictures_of_the_class_are_made_where_there_are_too_few(models, tmp_path):
    model, settings = models("sd1"), {"steps": 1, "size": (16, 16), "seed": 7}
    folder = tmp_path / "new" / "class"
    made = class_pictures(model, CLASS, folder, 3, batch=2, **settings)
    assert [file.name for file in made] == ["00000.png", "00001.png", "00002.png"]
    assert sorted(folder.iterdir()) == made
    seeds = [sfumato.generate(model, CLASS, steps=1, size=(16, 16), seed=seed)[0].array for seed in (7, 8, 9)]
    for file, array in zip(made, seeds, strict=True):
        with Image.open(file) as picture:
            assert np.abs(np.asarray(picture).astype(int) - array).max() <= 1
    before = [file.stat().st_mtime_ns for file in made]
    assert class_pictures(model, CLASS, folder, 2, **settings) == made
    made[1].rename(folder / "mine.JPG")
    assert class_pictures(model, CLASS, folder, 3, **settings) == [made[0], made[2], folder / "mine.JPG"]
    assert len(class_pictures(model, CLASS, folder, 4, batch=1, **settings)) == 4
    assert [made[0].stat().st_mtime_ns, made[2].stat().st_mtime_ns] == [before[0], before[2]]
