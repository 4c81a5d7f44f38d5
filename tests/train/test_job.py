"""A run as its settings say: what it leaves, that it can be repeated and gone on with, what is refused."""

from __future__ import annotations

import dataclasses as dc
import functools
import json
import os
import shutil
import signal
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sfumato
from sfumato.errors import FileError, SfumatoError
from sfumato.train import denoising, job, supply
from sfumato.train.cached import Files, with_cache
from sfumato.train.data import Batches, examples
from sfumato.train.groups import Samples
from sfumato.train.journal import Journal, read_history
from sfumato.train.own import Autoencoder, DreamBooth, Lora, TextToImage
from sfumato.train.settings import Settings
from train import jobs

from batches import assert_same, take
from training import leaves

RECIPE = Autoencoder(scales=0.25, standardise=2)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return jobs.furnish(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module", autouse=True)
def _kept(tmp_path_factory):
    """Runs of this file have the same programs."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("programs")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1)


@pytest.fixture
def said():
    return []


@pytest.fixture(scope="module")
def whole(place, tmp_path_factory):
    """A run with sample pictures and an average of the weights, and its outcome."""
    samples = Samples(pictures=(str(place / "pictures" / "0.png"),), every=3)
    made = jobs.settings(RECIPE, place, tmp_path_factory.mktemp("whole") / "run", samples=samples, optimizer__ema=0.5)
    return made, job.run(made)


@pytest.mark.slow
def test_what_a_run_leaves(place, whole):
    made, outcome = whole
    out = outcome.out
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "checkpoints", "config.json", "final", "history.json", "metrics.jsonl", "samples",
    ]  # fmt: skip
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "step-000000.png", "step-000003.png", "step-000004.png",
    ]  # fmt: skip
    (part,) = read_history(out)
    assert (part["from"], part["to"], part["devices"]) == (0, 4, 1)
    model = sfumato.load(outcome.final)
    trained = leaves({"vae": outcome.result.ema["vae"]})
    for path, value in leaves({"vae": model.vae}).items():
        if not path[1].endswith("quant_conv"):  # the average of the weights
            np.testing.assert_array_equal(value, trained[path])
    pixels = next(batches(place))["pixels"]
    assert model.vae.config.scaling_factor == 1
    assert np.abs(model.vae.encode(jnp.asarray(pixels)).mean()) < 0.5  # standardised
    config = json.loads((out / "config.json").read_text())
    assert config["versions"]["jax"] == jax.__version__
    assert config["run"]["dtype"] == "float32"
    assert config["optimizer"]["name"] == "adamw"
    assert Settings.read(out / "config.json") == made.with_flags({"run__dtype": "float32"})


@pytest.mark.slow
def test_a_configuration_repeats_the_run_and_samples_do_not_disturb_it(whole, tmp_path):
    again = Settings.read(whole[1].out / "config.json")
    job.run(again.with_flags({"run__out": str(tmp_path / "run"), "samples__pictures": ()}))
    assert jobs.losses(tmp_path / "run") == jobs.losses(whole[1].out)
    assert not (tmp_path / "run" / "samples").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on(whole, tmp_path, monkeypatch, said):
    made = whole[0].with_flags({"run__out": str(tmp_path / "a b"), "samples__pictures": ()})

    def stopping(self, step, state, metrics, call=Journal.__call__):
        call(self, step, state, metrics)
        if step == 3 and self.start == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Journal, "__call__", stopping)
    outcome = job.run(made, say=said.append)
    assert outcome.stopped
    assert outcome.final is None
    assert said == [f"Stopped after step 3 of 4; to go on: sfumato train --config '{tmp_path}/a b/config.json'"]
    for key, value, words in [
        ("run__seed", 1, "was begun with --seed 0, and this one has 1"),
        ("recipe__scales", 0.5, "was begun with --scales 0.25, and this one has 0.5"),
        ("optimizer__options", {"b1": 0.5}, "was begun with --optimizer-option none, and this one has b1=0.5"),
        ("run__resume", False, "name another --out, or go on with it"),
    ]:
        with pytest.raises(SfumatoError, match=words):
            job.run(made.with_flags({key: value}))
    outcome = job.run(made.with_flags({"run__keep": 1}), say=said.append)
    assert not outcome.stopped
    assert jobs.losses(outcome.out) == jobs.losses(whole[1].out)
    assert [(part["from"], part["to"]) for part in read_history(outcome.out)] == [(0, 3), (3, 4)]
    assert "in 2 parts" in (outcome.out / "README.md").read_text()
    done = job.run(made)  # there is nothing left to do
    assert (done.result.step, done.final) == (4, outcome.final)
    assert jobs.losses(outcome.out) == jobs.losses(whole[1].out)


def test_checkpoints_of_an_unknown_run(place, tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(SfumatoError, match=r"has checkpoints and no config.json, so it is unclear of what run"):
        job.run(jobs.settings(RECIPE, place, tmp_path))


@pytest.mark.parametrize(("recipe", "changes", "words"), [
    (RECIPE, {"data__batch": 3, "optimizer__accumulate": 2},
     "A batch of 3 cannot be divided over 1 devices in 2 parts; make --batch a multiple of 2."),
    (RECIPE, {"data__batch": 0}, "A batch of 0 cannot be divided over 1 devices; make --batch a multiple of 1."),
    (DreamBooth(class_prompt="a dog"), {"data__batch": 3, "optimizer__accumulate": 4},
     "A batch of 3 cannot be divided over 1 devices in 4 parts; make --batch a multiple of 2."),
    (RECIPE, {"parallel__devices": 99}, "There are"),
    (RECIPE, {"parallel__devices": 0}, "--devices is a number that 1 processes share evenly, not 0."),
    (RECIPE, {"optimizer__name": "adamm"}, "optax has no 'adamm'"),
    (RECIPE, {"optimizer__options": {"b9": 1}}, "adamw has no option 'b9'"),
    (Lora(), {"objective__min_snr": -1.0}, "min_snr must be above 0"),
    (Lora(), {"samples__every": 0}, "--sample-every is a whole number from 1 on, not 0."),
    (Lora(), {"samples__prompts_file": "nowhere.txt"}, "The prompts in nowhere.txt cannot be read"),
    (Lora(), {"samples__pictures": ("a.png",)}, "Sample pictures need prompts"),
    (RECIPE, {"samples__pictures": ("nowhere.png",)}, "nowhere.png"),
    (RECIPE, {"model__blank": True, "model__vae": "x"}, "--blank takes configurations alone"),
])  # fmt: skip
def test_what_does_not_fit_is_said_before_anything_is_loaded(place, tmp_path, recipe, changes, words):
    made = jobs.settings(recipe, place, tmp_path / "run", parallel__devices=1)
    made = made.with_flags({"model__source": "nowhere", **changes})
    with pytest.raises(SfumatoError) as caught:
        job.run(made)
    assert str(caught.value).startswith(words) or (len(words) < 12 and words in str(caught.value))
    assert not (tmp_path / "run").exists()


def test_boundaries_of_a_schedule_are_numbers(place, tmp_path):
    made = jobs.settings(
        RECIPE, place, tmp_path, optimizer__schedule="piecewise_constant", optimizer__learning_rate=0.5,
        optimizer__schedule_options={"boundaries_and_scales": {"2": 0.1}},
    )  # fmt: skip
    _, rates = job._optimizer(made)
    assert [round(float(rates["learning_rate"](step)), 6) for step in (0, 1, 2)] == [0.5, 0.5, 0.05]


@pytest.fixture(scope="module")
def model(place):
    return sfumato.load(place / "model")


def batches(place, **settings):
    return Batches(examples(place / "pictures"), batch=2, size=jobs.SIZE, threads=1, seed=3, **settings)


def test_a_model_of_configurations_alone(place, model, tmp_path):
    made = jobs.settings(RECIPE, place, tmp_path, model__blank=True, run__seed=5, run__dtype="bfloat16")
    with mock.patch.object(job, "blank", return_value=model) as blank:
        assert job._model(made) is model
    blank.assert_called_once_with(str(place / "model"), seed=5, dtype="float32")  # masters are not rounded
    with mock.patch.object(job, "load", return_value=model) as load:
        other = job._model(jobs.settings(Lora(), place, tmp_path, run__dtype="bfloat16", model__vae="other",
                                         objective__prediction_type="v_prediction"))  # fmt: skip
    assert load.call_args.kwargs == {"dtype": "bfloat16", "revision": None, "variant": None, "vae": "other"}
    assert other.schedule.prediction_type == "v_prediction"


@pytest.mark.slow
def test_cached_batches_are_those_of_the_pictures(place, model, tmp_path):
    cache = functools.partial(denoising.cache, model)
    folder = tmp_path / "cache"
    plain, memory = take(batches(place), 5), take(with_cache(batches(place), cache, None, 2), 5)
    disk = take(with_cache(batches(place, workers=2), cache, folder, 2, shard=(0, 2)), 0)
    assert len(Files(folder)) == 3  # the other process's share is missing
    disk = take(with_cache(batches(place), cache, folder, 2, shard=(1, 2)), 5)
    assert len(Files(folder)) == jobs.COUNT
    again = take(with_cache(batches(place), lambda batch: pytest.fail("is done twice"), folder, 2), 5)
    for one, other in zip(plain, memory, strict=True):
        want = cache(one)
        assert other.keys() == want.keys()
        for name in want:
            np.testing.assert_allclose(other[name], want[name], atol=1e-5, err_msg=name)
    read = take(with_cache(batches(place), functools.partial(cache, reads=True), None, 2), 5)
    assert [batch["text"] for batch in read] == [batch["text"] for batch in plain]
    assert read[0].keys() == {"latents", "text", "sizes", "index", "conditioning"}
    for one, other, third in zip(memory, disk, again, strict=True):
        assert one.keys() == other.keys() == third.keys()
        for name in one:  # a process that does its share has other pictures beside each
            np.testing.assert_allclose(other[name], one[name], atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(third[name], other[name], err_msg=name)


def test_every_turn_of_the_annotators_is_cached(place, tmp_path):
    def cache(batch):
        return {name: batch[name] for name in ("pixels", "conditioning", "index", "text")}

    def made():
        return batches(place, annotator=("canny", "grayscale"))

    plain, folder = take(made(), 12), tmp_path / "cache"
    for found in (take(with_cache(made(), cache, None, 2), 12), take(with_cache(made(), cache, folder, 2), 12)):
        assert_same([cache(one) for one in plain], found)
    assert len(Files(folder)) == 2 * jobs.COUNT


def test_a_broken_picture_is_left_out_of_the_cache_and_counted(place, tmp_path):
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    broken = tmp_path / "pictures" / "3.png"
    broken.write_bytes(broken.read_bytes()[:90])

    def cache(batch):
        return {"latents": batch["pixels"], "index": batch["index"]}

    def made(skip):
        return Batches(examples(tmp_path / "pictures"), batch=2, size=jobs.SIZE, skip_broken=skip, threads=1)

    with pytest.raises(FileError, match=r"3\.png"):
        with_cache(made(False), cache, None, 2)
    found = with_cache(made(True), cache, tmp_path / "cache", 2)
    assert list(found.skipped) == [str(broken)]
    seen = {int(index) for batch in take(found, 5) for index in batch["index"]}
    assert seen == {0, 1, 2, 4}
    take(with_cache(made(True), cache, tmp_path / "cache", 2), 5)  # known from the file


def test_a_stream_cannot_be_cached(unchecked):
    class Stream:
        _feed = None

    with pytest.raises(SfumatoError, match=r"A stream cannot be cached"):
        with_cache(Stream(), lambda batch: batch, None, 2)


def test_texts_that_are_cut_off_and_pictures_that_are_left_out_are_told_once(place, model, tmp_path, said):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(3):
        shutil.copy(place / "pictures" / "0.png", pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a " * 100 if number else "short")
    (pictures / "0.png").write_bytes(b"no picture")
    made = jobs.settings(Lora(), place, tmp_path / "run", data__source=str(pictures), data__skip_broken=True)
    cut = supply.Cut(1)
    data = supply.supply(made, model, tmp_path / "run", cut, said.append)
    for _ in range(3):
        batch = next(data.data)
        cut(lambda batch=batch: denoising.collate(model, batch), len(batch["index"]))
    data.close()
    job._tell(data, cut, said.append)
    assert said[0].startswith(f"1 pictures cannot be read and were left out, such as {pictures / '0.png'}: ")
    assert said[1:] == ["6 of 6 texts were longer than the text encoder reads, and were cut off."]


def test_pictures_of_the_class_are_drawn_where_there_are_none(place, model, tmp_path, said):
    own = DreamBooth(class_prompt="a dog", class_count=3, class_steps=2, class_guidance=5.0)

    def draw(model, prompt, folder, count, **how):
        assert (prompt, count, how["steps"], how["size"], how["controls"][0].scale) == ("a dog", 3, 2, jobs.SIZE, 5.0)
        shutil.copytree(place / "pictures", folder)

    with mock.patch.object(supply, "class_pictures", draw):
        data = supply.supply(jobs.settings(own, place, tmp_path), model, tmp_path, supply.Cut(1), said.append)
    assert next(data.data)["text"][1::2] == ["a dog", "a dog"]
    data.close()
    assert said == [f"Drawing 3 pictures of the class into {tmp_path / 'class'}"]


def test_pictures_of_the_class(place, model, tmp_path, said):
    own = DreamBooth(prompt="a photo of sks dog", class_prompt="a dog", class_data=str(place / "pictures"))
    made = jobs.settings(own, place, tmp_path)
    data = supply.supply(made, model, tmp_path, supply.Cut(1), said.append)
    batch = next(data.data)
    data.close()
    assert batch["prior"].tolist() == [False, True, False, True]
    assert batch["text"][1::2] == ["a dog", "a dog"]
    assert len(data.batches) == 2
    with pytest.raises(SfumatoError, match="one size, so here are no --buckets"):
        supply.supply(
            made.with_flags({"data__buckets": True, "data__bucket_step": 8}),
            model,
            tmp_path,
            supply.Cut(1),
            said.append,
        )
    both = made.with_flags({"data__flip": True, "data__cached": "memory"})
    with pytest.raises(SfumatoError, match="no --flip and no --crop beside --cached"):
        supply.supply(both, model, tmp_path, supply.Cut(1), said.append)


def test_caches_are_apart_for_whatever_makes_other_rows(place, tmp_path):
    one = jobs.settings(TextToImage(), place, tmp_path)
    folder = supply.cache_folder(one, tmp_path)
    assert supply.cache_folder(one.with_flags({"data__threads": 9, "optimizer__steps": 9}), tmp_path) == folder
    for change in ({"data__size": (32, 32)}, {"run__seed": 1}, {"model__vae": "other"}, {"data__text": "a"}):
        assert supply.cache_folder(one.with_flags(change), tmp_path) != folder


def test_the_weights_appear_when_they_are_complete(tmp_path, unchecked):
    @dc.dataclass
    class Broken:
        fails: bool = False

        def export(self, trained, folder):
            folder.mkdir()
            (folder / "weights").write_text(trained)
            if self.fails:
                raise OSError(28, "No space left on device")

    job.export(Broken(), "old", tmp_path / "run" / "final")
    with pytest.raises(SfumatoError, match=r"final cannot be written \(No space left on device\)"):
        job.export(Broken(True), "half", tmp_path / "run" / "final")
    assert (tmp_path / "run" / "final" / "weights").read_text() == "old"
    job.export(Broken(), "new", tmp_path / "run" / "final")
    assert (tmp_path / "run" / "final" / "weights").read_text() == "new"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["final"]


def test_devices_of_a_run(place, tmp_path):
    assert job._mesh(jobs.settings(RECIPE, place, tmp_path, parallel__devices=1)).devices.tolist() == jax.devices()[:1]
    assert job._mesh(jobs.settings(RECIPE, place, tmp_path)).devices.tolist() == jax.devices()
