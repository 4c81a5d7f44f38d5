"""What comes with the package is there, small enough, and goes wherever a path does."""

from __future__ import annotations

import dataclasses as dc

import numpy as np
import pytest

import sfumato
from sfumato import embedded
from sfumato.annotators import NAMES
from sfumato.embedded import PIECES
from tools.embedded.pack import LIMIT, stage
from tools.embedded.stages import STAGES

LOAD = {
    "model": sfumato.load,
    "controlnet": sfumato.load_controlnet,
    "lora": lambda name: sfumato.load_lora(name, sfumato.load(embedded.find(name).of)),
    "embedding": sfumato.load_embedding,
}


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_every_piece_is_whole_and_belongs_to_its_model(piece):
    assert sfumato.inspect(piece.name).problem is None
    assert LOAD[piece.kind](piece.name) is not None
    assert embedded.find(piece.of).kind == "model"
    assert 10 < len(piece.about) < 100
    assert stage(piece) in {each.name for each in STAGES}


def test_all_of_it_is_small_and_in_half_precision():
    assert sum(piece.size for piece in PIECES) <= LIMIT
    assert {*sfumato.inspect(embedded.DEFAULT).dtypes} == {"float16"}


def test_every_annotator_that_is_named_exists_and_finds_its_net():
    for piece in PIECES:
        for annotator in piece.annotators:
            assert annotator in NAMES
            assert embedded.controlnet_for(piece.of, annotator) is piece
    assert embedded.controlnet_for(embedded.DEFAULT, "nothing") is None
    assert embedded.controlnet_for("another model", "canny") is None


def test_a_name_wins_over_a_folder_and_a_path_is_still_a_path(tmp_path, monkeypatch):
    """The default model does not depend on what lies in the folder that one happens to be in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / embedded.DEFAULT).mkdir()
    assert sfumato.inspect(embedded.DEFAULT).problem is None
    with pytest.raises(sfumato.FileError):
        sfumato.load(f"./{embedded.DEFAULT}")


def test_the_model_says_how_it_wants_to_be_drawn():
    model = sfumato.load(embedded.DEFAULT)
    assert (model.guidance, model.guided, model.steps) == (3, sfumato.Window(0.0, 0.3), 20)
    (made,) = sfumato.generate(model, "red apple, noto", steps=2, size=(64, 64))
    assert made.metadata["settings"]["guidance"] == 3
    for said in ({}, {"guidance_scale": "high"}, {"guidance_scale": float("nan")}):
        assert dc.replace(model, options=said).guidance == 7.5


@pytest.mark.parity
def test_diffusers_opens_the_model(tmp_path):
    import diffusers
    import torch

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        embedded.find(embedded.DEFAULT).path, torch_dtype=torch.float32, safety_checker=None
    )
    assert pipeline.scheduler.config.algorithm_type == "sde-dpmsolver++"
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)  # which draws no noise
    pipeline.set_progress_bar_config(disable=True)
    model = sfumato.load(embedded.DEFAULT, dtype="float32")
    noise = np.random.default_rng(0).standard_normal((1, 16, 16, 8), np.float32)
    settings = {"num_inference_steps": 4, "guidance_scale": 4.0, "output_type": "np"}
    theirs = pipeline("red apple, noto", latents=torch.tensor(noise.transpose(0, 3, 1, 2)), **settings).images[0]
    drawn = {"latents": noise, "steps": 4, "sampler": "ddim"}
    (ours,) = sfumato.generate(model, "red apple, noto", controls=[sfumato.CFG(4.0)], **drawn)
    assert np.abs(ours.array / 255 - theirs).mean() < 2e-3
