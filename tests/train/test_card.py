"""The model card says what was done, and nothing else."""

from __future__ import annotations

import json

import pytest

import sfumato
from sfumato.train import card, shard
from sfumato.train.fit import Result
from sfumato.train.own import RECIPES, DreamBooth, TextualInversion
from train import jobs


@pytest.fixture(scope="module")
def model():
    return jobs.tiny()


@pytest.fixture
def facts(tmp_path, model):
    """(recipe, changes) -> the facts of a run of three steps."""
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([4.0, 2.0, 1.0, 3.0, 8.0], 1)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    history = [{"from": 0, "to": 2, "seconds": 50.2}, {"from": 2, "to": 5, "seconds": 3600.0}]

    def made(recipe, **changes):
        settings = jobs.settings(recipe, tmp_path, tmp_path, **changes)
        result = Result({}, None, 5, {}, None, None, False)
        return card.Facts(settings, tmp_path, model, 12, 3, result, shard.mesh_of(), history)

    return made


def row(text: str, name: str) -> str:
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return line.removeprefix(f"| {name} | ").removesuffix(" |")


def test_figures(facts):
    text = card.card(facts(RECIPES["lora"](), optimizer__options={"b1": 0.5}, optimizer__ema=0.9))
    assert row(text, "Data").endswith("pictures: 12 examples, 3 of them left out because they cannot be read")
    assert row(text, "Steps") == "5"
    assert row(text, "Examples seen") == "10"
    assert row(text, "Optimizer") == "adamw (b1=0.5)"
    assert row(text, "Learning rate") == "0.0001, constant"
    assert row(text, "Time") == "1 h 0 min, in 2 parts"
    assert row(text, "Losses") == "8 in step 5; averages of 2 steps: 2 at the end, 2 at best, up to step 4"
    assert row(text, "Size") == "16x16"
    assert "cpu" in row(text, "Hardware")
    assert f"sfumato {sfumato.__version__}" in row(text, "Versions")
    assert row(text, "Moving average").startswith("0.9, and these are")


def test_a_model_from_nothing(facts):
    assert row(card.card(facts(RECIPES["lora"](), model__blank=True)), "Base model").endswith(", random weights")


def test_front_matter_is_what_the_hub_reads(facts):
    from huggingface_hub import ModelCard

    text = card.card(facts(DreamBooth(prompt='a "sks" dog'), model__source="somebody/model"))
    data = ModelCard(text).data.to_dict()
    assert data["license"] == "unknown"
    assert data["base_model"] == "somebody/model"
    assert data["instance_prompt"] == 'a "sks" dog'
    assert "dreambooth" in data["tags"]
    assert "base_model" not in ModelCard(card.card(facts(DreamBooth()))).data.to_dict()


@pytest.mark.parametrize(("recipe", "words"), [
    (RECIPES["text-to-image"](), "-m {out}/final -o picture.png"),
    (RECIPES["controlnet"](), "-m {model} --control none=picture.png,net={out}/final"),
    (RECIPES["lora"](), "-m {model} --lora {out}/final/lora.safetensors"),
    (DreamBooth(rank=4, prompt="sks dog"), "'sks dog' -m {model} --lora {out}/final/lora.safetensors"),
    (DreamBooth(), "-m {out}/final"),
    (TextualInversion(token="<cat>"),
     "'a photo of <cat>' -m {model} --embedding {out}/final/learned_embeds.safetensors"),
    (RECIPES["instruct-pix2pix"](), "controls=[edit]"),
])  # fmt: skip
def test_how_to_use_it(facts, recipe, words):
    known = facts(recipe)
    assert words.format(out=known.out, model=known.settings.model.source) in card.use(known)


def test_the_control_of_the_training_is_that_of_the_use(facts):
    assert "--control canny=picture.png,net=" in card.use(
        facts(RECIPES["controlnet"](), data__control=("canny", "scribble"))
    )


def test_without_metrics_the_loss_is_unknown(tmp_path):
    assert card.losses(tmp_path / "no.jsonl", 10) == "unknown"
    (tmp_path / "a.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert card.losses(tmp_path / "a.jsonl", 10) == "unknown"


def test_times():
    assert card.time_of([{"seconds": 61.4}]) == "1 min 1 s"
    assert card.time_of([]) == "0 min 0 s"
