"""DreamBooth: the same step as diffusers', pictures of the class, batches of both kinds."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import sfumato
from sfumato.errors import SfumatoError
from sfumato.train.objective import Draws
from sfumato.train.recipes.dreambooth import WithPrior, class_pictures, dreambooth, weighted
from train.recipes.adapting import learned, numbers, one_picture, same_numbers, step

from training import Reference, assert_same, batch, draws, our_step

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
@pytest.mark.parametrize(("text", "weight"), [(False, 1.0), (True, 0.3)])
def test_a_step_is_that_of_the_reference(text, weight, pair):
    both, drawn = pair("sd1", small=True), draws()
    data = next(WithPrior(Data(2), Data(1)))
    task = dreambooth(both.model, prompt=SUBJECT, class_prompt=CLASS, prior_weight=weight, text=text)
    names = ["unet", "text_encoder"] if text else ["unet"]
    assert task.trainable.keys() == set(names)
    reference = Reference(both.pipeline, {name: getattr(both.pipeline, name) for name in names})
    loss = theirs(reference, data, drawn[0], weight, 2)
    loss.backward()
    (ours, _), gradient = our_step(task, drawn)(task.trainable, data)
    assert abs(float(ours) - float(loss.detach())) <= 1e-4 * float(loss.detach())
    assert_same(gradient, reference.as_ours(task.trainable, gradients=True))


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


def test_batches_go_on_from_a_state():
    both, other = WithPrior(Data(2), Data(1)), WithPrior(Data(2), Data(1))
    next(both)
    other.set_state(both.get_state())
    np.testing.assert_array_equal(next(both)["pixels"], next(other)["pixels"])


def test_pictures_of_two_sizes():
    with pytest.raises(SfumatoError, match="one size, not 16 x 16 and 16 x 8"):
        next(WithPrior(Data(2), Data(1, 8)))


@pytest.mark.slow
def test_the_loop_takes_them_and_goes_on(models, tmp_path):
    import optax

    from sfumato.train.fit import fit

    task = dreambooth(models("sd1"), prompt=SUBJECT, class_prompt=CLASS, rank=2)

    def run(steps: int, folder: Any) -> Any:
        return fit(
            task.loss, task.trainable, WithPrior(Data(2), Data(1)), optax.adamw(1e-2), frozen=task.frozen,
            collate=task.collate, steps=steps, folder=folder, quiet=True,
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


# The end


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 8])
def test_it_learns_a_picture_and_exports_it(rank, models, tmp_path):
    model, data = models("sd1"), one_picture()
    before = numbers(model)
    task = dreambooth(model, prompt=SUBJECT, rank=rank)
    trained, base, after = learned(task, data, 30, 2e-3 if rank is None else 1e-2)
    assert after < 0.7 * base
    task.export(trained, tmp_path / "out")
    if rank is None:
        exported = jax.tree.leaves(sfumato.load(tmp_path / "out").unet)
        assert same_numbers(exported, jax.tree.leaves(trained["unet"]))
    else:
        again = dreambooth(sfumato.load_lora(tmp_path / "out", model).apply(model), prompt=SUBJECT)
        want = step(task, trained, data, draws()[0])[0]
        assert step(again, again.trainable, data, draws()[0])[0] == pytest.approx(want, rel=1e-4)
    assert same_numbers(numbers(model), before)
