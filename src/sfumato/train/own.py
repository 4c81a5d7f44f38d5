# ruff: noqa: RUF009 - `setting` makes a field
"""The settings that each recipe has of its own: the arguments of its function in `sfumato.train.recipes`."""

from __future__ import annotations

import dataclasses as dc
import importlib
import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from sfumato.errors import SfumatoError
from sfumato.train.fields import Names, setting

TRAIN_TEXT = "Train the text encoders, too."
TARGETS = ("attention, transformer, all, or a regular expression that is looked for in the names of layers; may be "
           "repeated.")  # fmt: skip


@dc.dataclass(frozen=True)
class Recipe:
    """What a recipe has of its own."""

    name: ClassVar[str]
    summary: ClassVar[str]
    usual: ClassVar[Mapping[str, Any]]
    """Its defaults of settings of other groups that have none."""
    without: ClassVar[tuple[str, ...]] = ("data.control", "data.control_options")
    """Groups, and settings of groups, that mean nothing to it."""
    draws: ClassVar[Mapping[str, bool]] = {"prompts": True, "pictures": False}
    """What its sample pictures are made of."""

    def defaults(self) -> Mapping[str, Any]:
        """The defaults of settings of other groups, for these settings."""
        return self.usual

    @classmethod
    def hidden(cls, groups: Mapping[str, type]) -> Iterator[tuple[str, str]]:
        """The settings in `groups` that it does not have."""
        for place in cls.without:
            group, _, name = place.partition(".")
            yield from [(group, name)] if name else [(group, field.name) for field in dc.fields(groups[group])]

    def arguments(self, dtype: str) -> dict[str, Any]:
        """What the recipe's function is called with besides the model, the objective and what all take."""
        given = {field.name: getattr(self, field.name) for field in dc.fields(self)}
        return given | ({"targets": patterns(given["targets"])} if "targets" in given else {})

    def objective(self) -> dict[str, Any]:
        """Settings of the objective."""
        return {}

    @property
    def reads(self) -> bool:
        """Whether text encoders are trained, so that captions cannot be cached."""
        return False

    def loaded_in(self, dtype: str) -> str:
        """The type that the model is loaded in, where `dtype` is computed in: weights that are trained are not rounded
        before."""
        return "float32"

    def finished(self, model: Any, trained: Any, data: Iterator[Any]) -> Any:
        """What is exported of what was trained; `data` goes on with batches."""
        return trained

    def task(self, model: Any, objective: Any, **common: Any) -> Any:
        """The recipe's Task; of `common` (seed, dtype, remat, cached) it gets what it takes."""
        module = importlib.import_module(f"sfumato.train.recipes.{self.name.replace('-', '_')}")
        function = getattr(module, self.name.replace("-", "_"))
        takes = inspect.signature(function).parameters
        given = {"objective": objective, **common, **self.arguments(common["dtype"])}
        return function(model, **{key: value for key, value in given.items() if key in takes})


@dc.dataclass(frozen=True)
class TextToImage(Recipe):
    """Fine-tune a model, or train one from scratch."""

    name = "text-to-image"
    summary = "Fine-tune the UNet, and the text encoders if wished, or train them from scratch."
    usual: ClassVar = {"optimizer.learning_rate": 1e-5, "optimizer.steps": 10000, "objective.dropout": 0.1}

    train: Names = setting(("unet",), "A component to train: unet, text_encoder, text_encoder_2; may be repeated.")
    scratch: Names = setting((), "A component of these that starts from random numbers; may be repeated.")

    @property
    def reads(self) -> bool:
        return {*self.train} != {"unet"}


@dc.dataclass(frozen=True)
class Autoencoder(Recipe):
    """Train the autoencoder."""

    name = "autoencoder"
    summary = "Train the autoencoder between pictures and latents, on pictures alone."
    usual: ClassVar = {"optimizer.learning_rate": 1e-4, "optimizer.steps": 50000}
    without: ClassVar = (*Recipe.without, "data.cached", "data.conditioning_column", "objective")
    draws: ClassVar = {"prompts": False, "pictures": True}

    scratch: bool = setting(False, "Start from random numbers.")
    decoder: bool = setting(False, "Train the decoder alone: latents, and UNets that know them, stay right.",
                            flag="--decoder-only")  # fmt: skip
    l1: float = setting(1.0, "Weight of the difference of pixels.")
    scales: float = setting(0.5, "Weight of the same at 1/2, 1/4 and 1/8 of the size.")
    edges: float = setting(0.5, "Weight of the difference between neighbouring pixels' differences.")
    kl: float = setting(1e-6, "Weight of the latents' divergence from the normal distribution.")
    decorrelated: bool = setting(True, "Compare brightness and two colour axes, not red, green and blue.")
    adversarial: float = setting(0.0, "Weight of a discriminator that is trained beside it; 0: none.")
    adversarial_start: int = setting(0, "Steps before the discriminator begins.")
    standardise: int = setting(0, "Batches that the mean and the deviation of the latents are measured over at the "
                               "end, to be folded into the layers next to them: a UNet that is trained on the latents "
                               "after that sees 0 and 1. 0: leave them.", free=True)  # fmt: skip

    def arguments(self, dtype: str) -> dict[str, Any]:
        from sfumato.train.recipes import autoencoder as module

        if self.decoder and (self.scratch or self.standardise):
            raise SfumatoError("With --decoder-only latents stay what they are, so there is no --scratch and no "
                               "--standardise beside it.")  # fmt: skip
        terms = {name: getattr(self, name) for name in ("l1", "scales", "edges", "kl", "decorrelated")}
        judge = module.Adversarial(self.adversarial, self.adversarial_start) if self.adversarial else None
        return {
            "reconstruction": module.Reconstruction(**terms),
            "adversarial": judge,
            "scratch": self.scratch,
            "decoder": self.decoder,
        }

    def finished(self, model: Any, trained: Any, data: Iterator[Any]) -> Any:
        if not self.standardise:
            return trained
        from sfumato.train.standardise import standardised

        changed = standardised(dc.replace(model, vae=trained["vae"]), itertools.islice(data, self.standardise))
        return {**trained, "vae": changed.vae}


@dc.dataclass(frozen=True)
class ControlNet(Recipe):
    """Train a ControlNet."""

    name = "controlnet"
    summary = "Train a ControlNet: it starts as a copy of the UNet's encoder, which stays as it is."
    usual: ClassVar = {"optimizer.learning_rate": 1e-5, "optimizer.steps": 20000, "objective.dropout": 0.1}
    without: ClassVar = ()
    draws: ClassVar = {"prompts": True, "pictures": True}

    net: str | None = setting(None, "A ControlNet to start from instead of the UNet: a path or hub id.")
    hint: int = setting(
        16, "Channels of the first layer that reads the control picture; fewer make a smaller, faster net.",
        flag="--hint-channels",
    )  # fmt: skip
    edges: float = setting(
        0.0, "Weight of how far the edges of decoded pictures are from the data's in strength (ControlNet++): lines "
        "are followed more closely. 0: latents alone are compared.", flag="--consistent-edges",
    )  # fmt: skip
    colours: float = setting(0.0, "The same of colours, for controls that tell them.", flag="--consistent-colours")
    own: bool = setting(
        False, "Compare pictures that begin from what the network itself made of twice the noise, as they do where it "
        "draws; a quarter of the rows go through it twice.", flag="--consistent-own",
    )  # fmt: skip

    def arguments(self, dtype: str) -> dict[str, Any]:
        from sfumato.io.load import load_controlnet
        from sfumato.train.consistency import Consistency

        if self.net and self.hint != 16:
            raise SfumatoError("A ControlNet given by --net has its own layers, so there is no --hint-channels beside "
                               "it.")  # fmt: skip
        if self.own and not (self.edges or self.colours):
            raise SfumatoError("--consistent-own says where pictures that are compared begin, so it needs "
                               "--consistent-edges or --consistent-colours.")  # fmt: skip
        return {
            "net": load_controlnet(self.net, dtype="float32") if self.net else None,
            "hint": self.hint,
            "consistency": Consistency(self.edges, self.colours, own=self.own) if self.edges or self.colours else None,
        }


@dc.dataclass(frozen=True)
class Lora(Recipe):
    """Train a LoRA."""

    name = "lora"
    summary = "Train a LoRA: low-rank changes beside the layers of the model."
    usual: ClassVar = {"optimizer.learning_rate": 1e-4, "optimizer.steps": 1000, "objective.dropout": 0.0}

    rank: int = setting(4, "The rank of the changes.")
    alpha: float | None = setting(None, "The changes are multiplied by alpha / rank; the rank.")
    targets: Names = setting(("attention",), TARGETS, flag="--target")
    text: bool = setting(False, TRAIN_TEXT, flag="--train-text")

    @property
    def reads(self) -> bool:
        return self.text

    def loaded_in(self, dtype: str) -> str:
        return dtype


@dc.dataclass(frozen=True)
class DreamBooth(Recipe):
    """Teach a model a subject."""

    name = "dreambooth"
    summary = "Teach the model a subject by a few pictures, with others of its class to keep what is known of it."
    usual: ClassVar = {"optimizer.learning_rate": 5e-6, "optimizer.steps": 800, "objective.dropout": 0.0}

    prompt: str | None = setting(None, "What all pictures of the subject are called, such as 'a photo of sks dog'; "
                                 "their own texts.")  # fmt: skip
    class_prompt: str | None = setting(
        None, "What the subject is one of, such as 'a photo of a dog': pictures of it are trained beside the subject's."
    )
    prior_weight: float = setting(1.0, "How much the pictures of the class count.")
    class_data: str | None = setting(None, "A folder with pictures of the class; otherwise they are drawn into "
                                     "OUT/class.")  # fmt: skip
    class_count: int = setting(100, "How many pictures of the class to draw.")
    class_steps: int = setting(30, "Steps of the sampler for them.")
    class_guidance: float = setting(7.5, "How closely they follow --class-prompt.")
    text: bool = setting(False, TRAIN_TEXT, flag="--train-text")
    rank: int | None = setting(None, "Train a LoRA of this rank, with a learning rate of 1e-4; otherwise the whole "
                               "network.")  # fmt: skip
    alpha: float | None = setting(None, "Of a LoRA: the changes are multiplied by alpha / rank; the rank.")
    targets: Names = setting(("attention",), f"Of a LoRA: {TARGETS}", flag="--target")

    @property
    def reads(self) -> bool:
        return self.text

    def defaults(self) -> Mapping[str, Any]:
        return self.usual if self.rank is None else {**self.usual, "optimizer.learning_rate": 1e-4}

    def loaded_in(self, dtype: str) -> str:
        return "float32" if self.rank is None else dtype


@dc.dataclass(frozen=True)
class TextualInversion(Recipe):
    """Teach a model a word."""

    name = "textual-inversion"
    summary = "Teach the model a word: its vectors are all that is trained."
    usual: ClassVar = {"optimizer.learning_rate": 5e-3, "optimizer.steps": 3000, "objective.dropout": 0.0}
    without: ClassVar = (*Recipe.without, "data.cached")

    token: str = setting("", "The word, such as '<cat>'; it is needed.")
    vectors: int = setting(1, "How many vectors it has.")
    start: str | None = setting(None, "Words to start from; the mean of all words.", flag="--start-from")
    templates: Names = setting(("object",), "Captions of the pictures: object, style, or some of your own with {} for "
                               "the word; may be repeated.", flag="--template")  # fmt: skip
    captions: bool = setting(False, "Take the pictures' own texts, which have the word in them.", flag="--own-texts")

    def loaded_in(self, dtype: str) -> str:
        return dtype

    def arguments(self, dtype: str) -> dict[str, Any]:
        if not self.token:
            raise SfumatoError("--token is needed: the word that is taught, such as '<cat>'.")
        own = None if self.captions else self.templates[0] if len(self.templates) == 1 else self.templates
        return super().arguments(dtype) | {"templates": own}


@dc.dataclass(frozen=True)
class InstructPix2Pix(Recipe):
    """Teach a model to edit."""

    name = "instruct-pix2pix"
    summary = "Teach the model to edit a picture by what is said of it."
    usual: ClassVar = {"optimizer.learning_rate": 5e-5, "optimizer.steps": 15000, "objective.dropout": 0.05}
    draws: ClassVar = {"prompts": True, "pictures": True}

    image_dropout: float = setting(0.05, "Share of examples that go without the picture.")
    joint_dropout: float = setting(0.05, "Share of examples that go without both.")

    def objective(self) -> dict[str, Any]:
        return {"image_dropout": self.image_dropout, "joint_dropout": self.joint_dropout}


RECIPES: Mapping[str, type[Recipe]] = {
    recipe.name: recipe
    for recipe in (TextToImage, Autoencoder, ControlNet, Lora, DreamBooth, TextualInversion, InstructPix2Pix)
}


def patterns(targets: Names) -> str | list[str]:
    """Targets of a LoRA as its recipe takes them."""
    from sfumato.train.recipes.lora import TARGETS

    return targets[0] if len(targets) == 1 else [TARGETS.get(target, target) for target in targets]
