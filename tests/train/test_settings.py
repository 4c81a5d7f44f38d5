"""Settings: the same as flags, as a file and in Python; what does not fit is named."""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
import json

import pytest

from sfumato.errors import FileError, SfumatoError
from sfumato.train.fields import NEEDED, Kind, Names, Options, Size
from sfumato.train.groups import Data, Optimizer, Parallel, Run, Samples, Start
from sfumato.train.own import RECIPES, Autoencoder, DreamBooth, Lora, Recipe, TextToImage
from sfumato.train.settings import Settings, assembled, flags
from train import jobs


def settings(recipe: Recipe | None = None, **groups) -> Settings:
    known = {"model": Start("model"), "data": Data("pictures"), "run": Run("out")}
    return Settings(recipe or Lora(), **known | groups)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_as_json_and_back(recipe):
    for one in (settings(recipe()), jobs.changed(recipe)):
        again = Settings.from_json(json.loads(json.dumps(one.to_json())))
        assert again == one
        assert again.changed(one) is None


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_flags_are_told_apart_and_explained(recipe):
    names = [name for flag in flags(recipe) for each in flag.names for name in each.split("/")]
    assert len(set(names)) == len(names)
    assert all(flag.field.metadata["help"].endswith(".") for flag in flags(recipe))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_has_the_settings_of_its_function_with_the_same_defaults(recipe):
    name = recipe.name.replace("-", "_")
    module = importlib.import_module(f"sfumato.train.recipes.{name}")
    takes = inspect.signature(getattr(module, name)).parameters
    common = {"model", "objective", "seed", "dtype", "remat", "cached"}
    if recipe is Autoencoder:  # its loss is an object
        own = dict.fromkeys(("reconstruction", "adversarial", "scratch", "decoder"))
        terms = {field.name: field.default for field in dc.fields(module.Reconstruction)}
        assert terms == {name: getattr(Autoencoder(), name) for name in terms}
    else:
        given = recipe(**({"token": "<cat>"} if name == "textual_inversion" else {}))
        own = given.arguments("float32")
        for key in own.keys() & takes.keys() - {"token"}:
            default = takes[key].default
            assert own[key] == default, f"{key} is {default!r} in the function"
    assert takes.keys() - common <= own.keys()
    assert ("cached" in takes) == ("data.cached" not in recipe.without)


def test_defaults_that_a_recipe_has():
    assert settings(TextToImage()).objective.dropout == 0.1
    assert settings(DreamBooth()).optimizer.learning_rate == 5e-6
    assert settings(DreamBooth(rank=4)).optimizer.learning_rate == 1e-4
    assert settings(DreamBooth(rank=4), optimizer=Optimizer(learning_rate=0.5)).optimizer.learning_rate == 0.5


def test_a_setting_that_the_recipe_does_not_have():
    with pytest.raises(SfumatoError, match=r"autoencoder has no setting 'min_snr' of the group 'objective'"):
        Settings.from_json(settings(Autoencoder()).to_json() | {"objective": {"min_snr": 5.0}})
    assert "objective" not in settings(Autoencoder()).to_json()


def with_value(group: str, key: str, value) -> dict:
    raw = settings().to_json()
    return raw | {group: raw[group] | {key: value}}


@pytest.mark.parametrize(("raw", "words"), [
    (with_value("data", "bach", 4), "data has no setting 'bach'; did you mean 'batch'?"),
    (with_value("data", "batch", "4"), "data.batch is a whole number, not '4'."),
    (with_value("data", "batch", 4.5), "data.batch is a whole number, not 4.5."),
    (with_value("data", "size", [64]), "data.size is a size such as 512x512, not [64]."),
    (with_value("optimizer", "clip", float("nan")), "optimizer.clip is a number, not nan."),
    (with_value("optimizer", "options", [1]), "optimizer.options is settings such as b1=0.9, not [1]."),
    (with_value("run", "dtype", "int8"), "run.dtype is one of float32, bfloat16, float16, not 'int8'."),
    (with_value("samples", "prompts", "a fox"), "samples.prompts is a list of texts, not 'a fox'."),
    (with_value("recipe", "name", "loar"), "has no recipe 'loar'; did you mean 'lora'?"),
    (with_value("recipe", "ranks", 4), "recipe has no setting 'ranks'; did you mean 'rank'?"),
    (settings().to_json() | {"modle": {}}, "has no group 'modle'; did you mean 'model'?"),
    (settings().to_json() | {"model": {}}, "model needs 'source'."),
    (settings().to_json() | {"data": []}, "data is an object with settings, not []."),
    ([], "is no configuration of a training: it has no recipe."),
])  # fmt: skip
def test_a_configuration_that_is_wrong(raw, words):
    with pytest.raises(SfumatoError) as caught:
        Settings.from_json(raw, "a.json")
    assert str(caught.value).startswith("a.json")
    assert str(caught.value).endswith(words)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileError, match=r"cannot be read: No such file"):
        Settings.read(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(FileError, match=r"bad.json is not JSON"):
        Settings.read(tmp_path / "bad.json")


def test_what_changes_a_run_is_named():
    one = settings(data=Data("pictures", batch=4))
    free = settings(
        data=Data("pictures", batch=4, threads=1), run=Run("elsewhere", keep=5), parallel=Parallel(devices=2),
        samples=Samples(("a fox",)), optimizer=Optimizer(steps=20000),
    )  # fmt: skip
    assert free.changed(one) is None
    flag, before, now = one.changed(settings(data=Data("pictures", batch=8)))
    assert (flag.name, flag.shown(before), flag.shown(now)) == ("--batch", "8", "4")
    flag, _, now = settings(Lora(text=True)).changed(settings())
    assert (flag.name, flag.shown(now)) == ("--train-text", "on")
    with pytest.raises(SfumatoError, match=r"one of the recipe lora, and this is dreambooth"):
        settings(DreamBooth()).changed(settings())


def test_flags_over_a_file():
    one = settings(data=Data("pictures", batch=4))
    assert one.with_flags({}) == one
    other = one.with_flags({"run__out": "there", "recipe__rank": 2})
    assert (other.run.out, other.recipe.rank, other.data.batch) == ("there", 2, 4)


def test_what_is_needed_is_named():
    with pytest.raises(SfumatoError, match=r"--data is needed: a folder with"):
        assembled(Lora, {"model__source": "m", "run__out": "o"})
    assert {flag.name for flag in flags(Lora) if flag.default is NEEDED} == {"--model", "--data", "--out"}


@pytest.mark.parametrize(("kind", "text", "value"), [
    (Size, "64x48", (64, 48)),
    (Size, " 64 X 48 ", (64, 48)),
    (Options, ["b1=0.9", "name=adam", "on=true", "none=null", 'boundaries={"5": 0.1}', "text='"],
     {"b1": 0.9, "name": "adam", "on": True, "none": None, "boundaries": {"5": 0.1}, "text": "'"}),
    (Names, ["a", "b"], ("a", "b")),
])  # fmt: skip
def test_what_flags_say(kind, text, value):
    assert Kind(kind, False).parse(text, "--it") == value
    told = Kind(kind, False).told(value)
    assert Kind(kind, False).parse(told if kind is not Size else told[0], "--it") == value


@pytest.mark.parametrize(("kind", "text", "words"), [
    (Size, "64", "--it is a size such as 512x512, not '64'."),
    (Size, "0x64", "--it is a size such as 512x512"),
    (Options, ["b1"], "--it takes NAME=VALUE, such as b1=0.9, not 'b1'."),
    (float, float("inf"), "--it is a number, not inf."),
])  # fmt: skip
def test_flags_that_say_nothing(kind, text, words):
    with pytest.raises(SfumatoError) as caught:
        Kind(kind, False).parse(text, "--it")
    assert words in str(caught.value)
