"""`sfumato generate`: pictures from a prompt, steered as on the command line."""

from __future__ import annotations

import dataclasses as dc
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sfumato.cli.adapters import EmbeddingOption, LoraOption, adapted, parse_lora
from sfumato.cli.kernels import Int8Option, PrepareOption, as_wished, check_kernels
from sfumato.cli.size import parsed_size
from sfumato.cli.status import INTERRUPTED
from sfumato.embedded import DEFAULT, controlnet_for
from sfumato.errors import SfumatoError

if TYPE_CHECKING:
    from sfumato.cli.watch import Watch
    from sfumato.images import Images

PLAIN = ("none", "image")
"""In place of an annotator: the picture is a control picture already."""

NEXT = (
    "Next: another --seed, -n 8 --grid, --negative, a --control with a picture of yours; `sfumato models` lists what "
    "is there, and -m takes your own model."
)
"""What to try once the embedded model has drawn something."""

ControlOption = typer.Option(
    "--control", metavar="ANNOTATOR=PICTURE[,net=NET,...]",
    help="Steer with a ControlNet; may be repeated. The annotator (`sfumato annotators`, or none if the picture is a "
    "control picture already) makes the control picture out of the picture; net is a path, a hub id or one of `sfumato "
    "models`, whose own are found by the annotator. Further: "
    "scale=0.8, start=0, stop=0.6 (shares of the steps), guess, and the annotator's own options.",
)  # fmt: skip


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Where to write: .png, .jpg or .webp; of several pictures "
                                      "the name may hold {index} and {seed}, and is numbered otherwise.")],
    model: Annotated[str, typer.Option("-m", "--model", help="A folder, a single-file checkpoint, a hub id, or one of "
                                       "`sfumato models`.")] = DEFAULT,
    negative: Annotated[str | None, typer.Option(help="What not to draw.")] = None,
    control: Annotated[list[str] | None, ControlOption] = None,
    lora: Annotated[list[str] | None, LoraOption] = None,
    embedding: Annotated[list[str] | None, EmbeddingOption] = None,
    image: Annotated[Path | None, typer.Option(help="Start from this picture; with --mask, repaint it there.")] = None,
    strength: Annotated[float | None, typer.Option(help="How much to change --image, 0 to 1 (0.8).")] = None,
    mask: Annotated[Path | None, typer.Option(help="White is repainted, black stays.")] = None,
    sampler: Annotated[str | None, typer.Option(help="One of `sfumato samplers`; otherwise the model's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Evaluations of the network; 30, or what the model says.")] = None,
    guidance: Annotated[float | None, typer.Option(help="How closely to follow the prompt; 1 is no guidance. 7.5, or "
                                                   "what the model says.")] = None,
    rescale: Annotated[float, typer.Option(help="Share, 0 to 1, of the correction for too strong contrast.")] = 0.0,
    deepcache: Annotated[int | None, typer.Option(metavar="N", help="Faster, not exact: compute the deeper part of the "
                                                  "network in every Nth step alone, such as 3.")] = None,
    token_merging: Annotated[float | None, typer.Option(metavar="SHARE", help="Faster, not exact: merge that share of "
                                                        "tokens in large attention layers, such as 0.5.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Such as 768x512; the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first picture; the others follow.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", help="How many pictures.")] = 1,
    grid: Annotated[bool, typer.Option("--grid", help="Write all pictures on one sheet.")] = False,
    batch: Annotated[int | None, typer.Option(help="How many pictures to make at once; all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    int8: Annotated[bool, Int8Option] = False,
    prepare: Annotated[bool, PrepareOption] = False,
    vae: Annotated[str | None, typer.Option(help="Another autoencoder: a path or hub id.")] = None,
    clip_skip: Annotated[int, typer.Option(help="Leave out that many more of the text encoder's layers.")] = 0,
    literal: Annotated[bool, typer.Option("--literal", help="No weights in the prompt: (a) and [a] are text.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print files, seeds, seconds and settings as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but mistakes.")] = False,
) -> None:  # fmt: skip
    """Make pictures: `sfumato generate "a red fox" -o fox.png`."""
    from sfumato.cli.watch import Watch
    from sfumato.controls import Inpaint

    try:
        check_kernels(int8, prepare)
        controls = [_control(text, model) for text in control or ()]
        others = _faster(deepcache, token_merging)
        adapters = [parse_lora(text) for text in lora or ()], list(embedding or ())
        _check(out, sampler, seed, count, steps, batch, guidance, rescale, image, strength, mask, grid)
        settings: dict[str, Any] = {
            "negative": negative, "sampler": sampler, "steps": steps, "size": parsed_size(size), "count": count,
            "seed": seed, "clip_skip": clip_skip, "weights": not literal, "batch": batch,
        }  # fmt: skip
        if image is not None and mask is not None:
            others.append(Inpaint(image, mask))
        elif image is not None:
            settings |= {"image": image, "strength": 0.8 if strength is None else strength}
        rounds = math.ceil(count / (batch or count))
        watch = Watch(rounds, quiet=quiet or json)
        images = _drawn(
            prompt, _Source(model, dtype, vae, adapters, int8, prepare), (guidance, rescale), controls, others,
            settings, watch,
        )  # fmt: skip
        files = [images.grid().save(out)] if grid else images.save(out)
        if json or not quiet:
            _tell(images, files, watch, json)
        if model == DEFAULT:
            watch.say(NEXT)
    except KeyboardInterrupt:
        typer.echo("sfumato: Interrupted.", err=True)
        raise typer.Exit(INTERRUPTED) from None


@dc.dataclass(frozen=True)
class _Source:
    """What is loaded, and how."""

    name: str
    dtype: str | None
    vae: str | None
    adapters: tuple[list[tuple[str, float]], list[str]]
    int8: bool
    prepare: bool

    def model(self) -> Any:
        """The model with its adapters."""
        import sfumato

        model = adapted(sfumato.load(self.name, dtype=self.dtype, vae=self.vae), *self.adapters)
        return as_wished(model, self.int8, self.prepare)

    def controlnet(self, name: str) -> Any:
        """A ControlNet for it."""
        import sfumato

        return as_wished(sfumato.load_controlnet(name, dtype=self.dtype), self.int8, self.prepare)


def _drawn(
    prompt: str, source: _Source, guidance: tuple[float | None, float], nets: list[_Control], others: list[Any],
    settings: dict[str, Any], watch: Watch,
) -> Images:  # fmt: skip
    """Loads and makes."""
    import sfumato
    from sfumato.plan import size_of

    watch.loading(source.name)
    model = source.model()
    controls: list[Any] = [sfumato.CFG.of(model, *guidance), *others]
    for one in nets:
        net, picture = source.controlnet(one.net), one.picture(size_of(model, settings["size"]))
        controls.append(sfumato.ControlNet(net, picture, one.scale, sfumato.Window(*one.window), one.guess))
    with watch:
        images = sfumato.generate(model, prompt, controls=controls, progress=watch.progress, **settings)
    watch.done()
    return images


def _tell(images: Images, files: list[Path], watch: Watch, json: bool) -> None:
    """Where they are, and how long it took."""
    from json import dumps

    if json:
        facts = dict(images[0].metadata)
        facts["settings"] = {key: value for key, value in facts["settings"].items() if key != "seed"}
        seeds = [picture.metadata["settings"]["seed"] for picture in images]
        seconds = {key: round(value, 3) for key, value in watch.seconds.items()}
        typer.echo(dumps({"files": [str(file) for file in files], "seeds": seeds, "seconds": seconds} | facts))
    else:
        watch.say(f"Sampled in {watch.seconds['sample']:.1f} s, decoded in {watch.seconds['decode']:.1f} s")
        typer.echo("\n".join(map(str, files)))


def _faster(deepcache: int | None, token_merging: float | None) -> list[Any]:
    """The controls that save time. Raises SfumatoError for what they do not take, before anything is loaded."""
    found: list[Any] = []
    if deepcache is not None:
        from sfumato.controls import DeepCache
        from sfumato.controls.check import whole

        found.append(DeepCache(int(whole("--deepcache", deepcache, 1))))
    if token_merging is not None:
        from sfumato.controls import token_merging as merging
        from sfumato.controls.check import finite

        found.append(merging.TokenMerging(finite("--token-merging", token_merging, 0, merging.MOST)))
    return found


@dc.dataclass(frozen=True)
class _Control:
    """A --control."""

    net: str
    annotator: str
    photo: Any
    options: Mapping[str, Any]
    scale: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    guess: bool = False

    def picture(self, size: tuple[int, int]) -> Any:
        """The control picture, annotated at the size that is drawn: what is an edge or a thin line depends on it."""
        from sfumato.annotators import annotate
        from sfumato.image import resize

        photo = resize(self.photo, size)
        return photo if self.annotator in PLAIN else annotate(self.annotator, photo, **self.options)


def _control(text: str, model: str) -> _Control:
    """Reads ANNOTATOR=PICTURE,net=NET,...; without net= it is the one that comes with the model. Raises SfumatoError
    for what does not fit."""
    from PIL import Image

    from sfumato.annotators import annotate
    from sfumato.controls.check import finite, window
    from sfumato.image import read
    from sfumato.types import Window

    (annotator, _, photo), *rest = (part.strip().partition("=") for part in text.split(","))
    if not photo:
        raise SfumatoError(
            f"--control takes ANNOTATOR=PICTURE, such as canny=photo.png, and then settings; not {text!r}."
        )
    values = {key: value if sign else None for key, sign, value in rest}
    flags = [key for key, value in values.items() if value is None and key != "guess"]
    if flags or len(values) < len(rest):
        what = f"{flags[0]!r} has no value" if flags else "a setting is there twice"
        raise SfumatoError(f"--control {text}: {what}; settings are written as scale=0.8, with commas between them.")
    own = controlnet_for(model, annotator)
    net = values.pop("net", own.name if own else None)
    if not net:
        raise SfumatoError(f"--control {text} names no ControlNet; add net= with a path or hub id.")
    guess = "guess" in values and values.pop("guess") not in ("0", "false", "no")
    scale = finite("ControlNet's scale", values.pop("scale", 1))
    inside = window("ControlNet", Window(values.pop("start", 0), values.pop("stop", 1)))  # pyright: ignore[reportArgumentType]
    if annotator in PLAIN and values:
        raise SfumatoError(f"--control {text}: a plain picture has no setting {next(iter(values))!r}.")
    if annotator not in PLAIN:
        annotate(annotator, Image.new("RGB", (64, 64)), **values)  # what does not fit is said before anything is loaded
    span = (float(inside.start), float(inside.stop))
    return _Control(net, annotator, read(photo), values, scale, span, guess)


def _check(
    out: Path, sampler: str | None, seed: int, count: int, steps: int | None, batch: int | None,
    guidance: float | None, rescale: float, image: Path | None, strength: float | None, mask: Path | None, grid: bool,
) -> None:  # fmt: skip
    """Raises SfumatoError for what would fail in the end, or does not go together, before anything is loaded."""
    from sfumato.controls.check import finite
    from sfumato.image import format_of, read, read_mask
    from sfumato.noise import checked
    from sfumato.samplers import sampler as sampler_of
    from sfumato.schedule import Schedule

    for name, value in (("--count", count), ("--steps", steps), ("--batch", batch)):
        if value is not None and value < 1:
            raise SfumatoError(f"{name} must be a whole number from 1 on, not {value}.")
    seeds = checked([seed, seed + count - 1])
    _check_place(out, count, grid, seeds[0])
    format_of(out)
    if guidance is not None:
        finite("--guidance", guidance)
    finite("--rescale", rescale, 0, 1)
    if sampler is not None:
        sampler_of(sampler, Schedule())
    if strength is not None:
        finite("--strength", strength, 0, 1)
        if image is None or mask is not None:
            raise SfumatoError("--strength says how much of --image to change, so it needs --image and no --mask.")
    if mask is not None and image is None:
        raise SfumatoError("--mask says where to repaint a picture; give the picture as --image.")
    if image is not None:
        size = read(image).size
        if mask is not None and read_mask(mask).shape[1::-1] != size:
            raise SfumatoError(f"The mask {mask} must have the size of {image}, {size[0]}x{size[1]}.")


def _check_place(out: Path, count: int, grid: bool, seed: int) -> None:
    """Raises SfumatoError if the pictures could not be written in the end."""
    import numpy as np

    from sfumato.images import Images, Picture

    blank = np.zeros((1, 1, 3), np.uint8)
    seeds = [seed] if grid else range(seed, seed + count)
    names = Images([Picture(blank, {"settings": {"seed": one}}) for one in seeds]).names(out)
    for name in names:
        folder = next(folder for folder in name.absolute().parents if folder.exists())
        if name.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise SfumatoError(f"{name} cannot be written; name a file in a folder that can.")
