"""A tiny model, pictures, and runs of `sfumato train` with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sfumato
from sfumato.io.family import Family
from sfumato.model import Model
from sfumato.models.clip import ClipTextConfig, ClipTextEncoder
from sfumato.models.config import UNetConfig, from_dict
from sfumato.models.unet import UNet
from sfumato.models.vae import AutoencoderKL, VAEConfig
from sfumato.schedule import Schedule
from sfumato.text.tokenizer import clip_tokenizer
from sfumato.train.fields import Names, Options, Size
from sfumato.train.groups import Data, Optimizer, Run, Samples, Start
from sfumato.train.own import Recipe
from sfumato.train.settings import Settings, assembled, flags

from models.tiny import SD1
from oracle import fresh
from pictures import drawing
from pipelines import SMALL, TEXT, VAE

OTHER = {bool: True, int: 7, float: 0.25, str: "other", Size: (64, 48), Names: ("a b", "c"), Options: {"x": 1.5}}
"""A value of each kind that is nobody's default."""

COUNT = 5
SIZE = (16, 16)


def tiny() -> Model:
    """A model that compiles quickly."""
    networks = {
        "unet": (UNet, from_dict(UNetConfig, SD1 | SMALL | {"mid_block_type": None})),
        "vae": (AutoencoderKL, from_dict(VAEConfig, VAE)),
        "text_encoder": (ClipTextEncoder, from_dict(ClipTextConfig, TEXT | {"num_hidden_layers": 1})),
    }  # fmt: skip
    made = {name: fresh(kind, config) for name, (kind, config) in networks.items()}
    encoders, tokenizers = {"text_encoder": made["text_encoder"]}, {"tokenizer": clip_tokenizer("<|endoftext|>")}
    return Model(made["unet"], made["vae"], encoders, tokenizers, Schedule(), Family.SD1, "tiny")


def furnish(folder: Path) -> Path:
    """Puts a model and pictures, each with a text and a control picture, into a folder."""
    sfumato.save(tiny(), folder / "model")
    pictures = folder / "pictures"
    pictures.mkdir()
    lines = []
    for number in range(COUNT):
        drawing(16 + number, 16).save(pictures / f"{number}.png")
        drawing(16 + number, 16).rotate(180).save(pictures / f"other-{number}.png")
        entry = {"file_name": f"{number}.png", "text": f"picture {number}", "conditioning_image": f"other-{number}.png"}
        lines.append(json.dumps(entry))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def settings(recipe: Recipe, place: Path, out: Path, **changes: Any) -> Settings:
    """Four steps of two pictures each; `changes` are values of flags by their keys, or whole groups."""
    groups: dict[str, Any] = {
        "model": Start(str(place / "model")), "data": Data(str(place / "pictures"), size=SIZE, batch=2, threads=1),
        "optimizer": Optimizer(steps=4), "run": Run(str(out), save_every=2), "samples": Samples(),
    }  # fmt: skip
    groups |= {key: value for key, value in changes.items() if key in groups}
    flags = {key: value for key, value in changes.items() if key not in groups}
    return Settings(recipe, **groups).with_flags(flags)


def losses(out: Path) -> list[float]:
    """The losses of all steps of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def changed(recipe: type[Recipe]) -> Settings:
    """Every setting of a recipe is another than its default."""
    given = {}
    for flag in flags(recipe):
        given[flag.key] = flag.kind.choices[-1] if flag.kind.choices else OTHER[flag.kind.type]
        if flag.kind.type is bool and flag.default is True:
            given[flag.key] = False
    return assembled(recipe, given)
