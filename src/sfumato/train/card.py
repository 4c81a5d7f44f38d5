"""The model card of a run: a README.md as the Hugging Face hub has them, made of facts alone."""

from __future__ import annotations

import dataclasses as dc
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from sfumato.machine import processor
from sfumato.model import Model
from sfumato.train.fit import Result
from sfumato.train.own import DreamBooth, TextualInversion
from sfumato.train.settings import Settings
from sfumato.version import __version__

LIBRARIES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
LORA = "lora.safetensors"


@dc.dataclass(frozen=True)
class Facts:
    """What a card says."""

    settings: Settings
    out: Path
    model: Model
    examples: int | None
    """How many there were; None for a stream."""
    skipped: int
    """How many of them could not be read."""
    result: Result
    mesh: Mesh
    history: Sequence[Mapping[str, Any]]
    """The parts that the run was done in, with their seconds."""


def versions() -> dict[str, str]:
    """What a run is made with."""
    return {"sfumato": __version__, "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in LIBRARIES}}  # fmt: skip


def card(facts: Facts) -> str:
    """The text of the card."""
    settings = facts.settings
    title = f"{Path(facts.out).absolute().name}: {settings.recipe.name} on {facts.model.name}"
    parts = [front(facts), f"# {title}", f"{settings.recipe.summary} Trained with sfumato {__version__}."]
    sheets = sorted((facts.out / "samples").glob("step-*.png"))
    if sheets:
        parts.append(f"![Samples after step {int(sheets[-1].stem[5:])}](samples/{sheets[-1].name})")
    parts += ["## Use", use(facts), "## Training", table(facts), "## Command", f"```\n{settings.command()}\n```",
              "`sfumato train --config config.json --out FOLDER` does the same again; config.json has every setting.",
              "## Licence", "Unknown: whoever publishes this says here, and in the first lines of this file, under "
              "which licence. That of the base model and that of the pictures may bind it."]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def front(facts: Facts) -> str:
    """What the hub reads."""
    recipe = facts.settings.recipe
    task = "image-to-image" if recipe.name == "instruct-pix2pix" else "text-to-image"
    tags = ["sfumato", "stable-diffusion", recipe.name]
    lines = ["license: unknown", f"pipeline_tag: {task}", "tags:", *(f"- {tag}" for tag in tags)]
    if hub_id(facts.settings.model.source):
        lines.append(f"base_model: {facts.settings.model.source}")
    if isinstance(recipe, DreamBooth) and recipe.prompt:
        lines.append(f"instance_prompt: {json.dumps(recipe.prompt)}")
    return "\n".join(["---", *lines, "---"])


def hub_id(source: str) -> bool:
    """Whether a model was named by its hub id, as far as its name tells."""
    return source.count("/") == 1 and not source.startswith((".", "/", "~")) and not Path(source).exists()


def table(facts: Facts) -> str:
    """The figures."""
    settings, chosen, result = facts.settings, facts.settings.optimizer, facts.result
    data, batch = settings.data, settings.data.batch
    count = "a stream" if facts.examples is None else f"{facts.examples} examples"
    skipped = f", {facts.skipped} of them left out because they cannot be read" if facts.skipped else ""
    size = "the model's own size" if data.size is None else "{}x{}".format(*data.size)
    warmup = f" after {chosen.warmup} steps of warm-up" if chosen.warmup else ""
    start = ", random weights" if settings.model.blank else ""
    rows = {
        "Recipe": settings.recipe.name,
        "Base model": f"{facts.model.name} ({facts.model.family.full_name}){start}",
        "Data": f"{data.source}: {count}{skipped}",
        "Size": f"about {size}, in buckets of proportions" if data.buckets else size,
        "Steps": result.step,
        "Batch": f"{batch}" + (f" in {chosen.accumulate} parts" if chosen.accumulate > 1 else ""),
        "Examples seen": result.step * batch,
        "Optimizer": f"{chosen.name} {_options(chosen.options)}".strip(),
        "Learning rate": f"{chosen.learning_rate:g}, {chosen.schedule} {_options(chosen.schedule_options)}".strip()
        + warmup,
        "Moving average": f"{chosen.ema:g}, and these are the weights here" if chosen.ema else "none",
        "Computed in": settings.run.dtype,
        "Losses": losses(facts.out / "metrics.jsonl", settings.run.save_every),
        "Hardware": hardware(facts.mesh),
        "Time": time_of(facts.history),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    lines = [f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _options(options: Mapping[str, Any]) -> str:
    return f"({', '.join(f'{key}={value}' for key, value in options.items())})" if options else ""


def losses(path: Path, every: int) -> str:
    """The loss of the last step, and averages between checkpoints: the last and the smallest."""
    try:
        lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except (OSError, ValueError):
        return "unknown"
    known = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    if not known:
        return "unknown"
    parts: dict[int, list[float]] = {}
    for step, loss in known:
        parts.setdefault((step - 1) // every, []).append(loss)
    length = max(map(len, parts.values()))
    means = {part: sum(values) / length for part, values in parts.items() if len(values) == length}
    last, best = max(means), min(means, key=lambda part: means[part])
    return (
        f"{known[-1][1]:.4g} in step {known[-1][0]}; averages of {length} steps: {means[last]:.4g} at the end, "
        f"{means[best]:.4g} at best, up to step {best * every + length}"
    )


def hardware(mesh: Mesh) -> str:
    """Devices and host."""
    device = mesh.devices.flat[0]
    processes = len({each.process_index for each in mesh.devices.flat})
    among = f" of {processes} processes" if processes > 1 else ""
    return (
        f"{mesh.size} x {device.device_kind} ({device.platform}){among}; host {processor()}, {os.cpu_count()} threads"
    )


def time_of(history: Sequence[Mapping[str, Any]]) -> str:
    """The wall time of all parts."""
    seconds = sum(part["seconds"] for part in history)
    minutes, rest = divmod(round(seconds), 60)
    words = f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
    return words + (f", in {len(history)} parts" if len(history) > 1 else "")


def use(facts: Facts) -> str:
    """How to make pictures with what came out."""
    settings, final = facts.settings, shlex.quote(str(facts.out / "final"))
    base, recipe = shlex.quote(settings.model.source), settings.recipe
    if recipe.name == "instruct-pix2pix":
        return _block(f"""
import sfumato

model = sfumato.load({str(facts.out / "final")!r})
edit = sfumato.InstructPix2Pix("photo.png")
sfumato.generate(model, "make it winter", controls=[edit])[0].save("winter.png")""", "python")  # fmt: skip
    prompt = "a red fox in the snow"
    more = f"-m {final}"
    if recipe.name == "controlnet":
        annotator = next(iter(settings.data.control), "none")
        more = f"-m {base} --control {annotator}=picture.png,net={final}"
    elif recipe.name == "lora" or (isinstance(recipe, DreamBooth) and recipe.rank is not None):
        more = f"-m {base} --lora {final}/{LORA}"
    elif isinstance(recipe, TextualInversion):
        prompt, more = f"a photo of {recipe.token}", f"-m {base} --embedding {final}/learned_embeds.safetensors"
    if isinstance(recipe, DreamBooth) and recipe.prompt:
        prompt = recipe.prompt
    return _block(f"sfumato generate {shlex.quote(prompt)} {more} -o picture.png")


def _block(text: str, language: str = "") -> str:
    return f"```{language}\n{text.strip()}\n```"
