"""The table of what is trained, in what order and how."""

from __future__ import annotations

import dataclasses as dc
import shlex
from collections.abc import Mapping
from pathlib import Path

ADAM = "--clip 1 --optimizer-option b2=0.99 --schedule cosine"
VELOCITY = "--min-snr 6 --snr-floor 1 --stratified"
"""Weights of 1 from the noisiest times down to a signal-to-noise ratio of 5, and less for the clean ones."""

SIZES: Mapping[str, Mapping[str, str]] = {
    "small": {
        "nouns": "--concepts tools/art/nouns.txt", "styles": "--styles noto,twemoji,fluent-3d", "scale": "small",
        "cuts": "4500", "batch": "32", "steps": "12000", "rate": "1.3e-3", "net": "1500",
    },
    "large": {
        "nouns": "", "styles": "", "scale": "large",
        "cuts": "20000", "batch": "128", "steps": "30000", "rate": "6e-4", "net": "4000",
    },
}  # fmt: skip
"""What differs between a model for hours of a laptop's processor and one for a GPU."""


@dc.dataclass(frozen=True)
class Stage:
    """A command; {runs} in it is the folder of everything, other names are those of `SIZES`."""

    name: str
    text: str
    done: str = ""
    """What is there when it is done, in {runs}."""

    def __post_init__(self) -> None:
        if not self.done:
            object.__setattr__(self, "done", f"{self.name}/final")

    def command(self, runs: Path, scale: str) -> list[str]:
        """The words of the command."""
        return shlex.split(self.text.format(runs=shlex.quote(str(runs)), **SIZES[scale]))


def _net(name: str, controls: str) -> Stage:
    """A ControlNet. It learns from all concepts, more than the base knows, so that it follows the control picture and
    does not take it for a name."""
    return Stage(
        name,
        f"sfumato train controlnet -m {{runs}}/base/final -d {{runs}}/concepts -o {{runs}}/{name} {controls} --cached "
        f"memory --hint-channels 8 --batch {{nets}} --steps {{net}} --learning-rate 1e-3 --warmup 50 --ema 0.99 --dropout 0.2 "
        f"{VELOCITY} {ADAM}",
    )


STAGES = (
    Stage("art", "python -m tools.art {runs}/art --cache {runs}/packages", "art/metadata.jsonl"),
    Stage(
        "concepts", "python -m tools.art {runs}/concepts --cache {runs}/packages {styles}", "concepts/metadata.jsonl",
    ),
    Stage("nouns", "python -m tools.art {runs}/nouns --cache {runs}/packages {nouns} {styles}", "nouns/metadata.jsonl"),
    Stage(
        "blob", "python -m tools.art {runs}/blob --cache {runs}/packages {nouns} --styles noto-blob",
        "blob/metadata.jsonl",
    ),
    Stage("start", "python -m tools.embedded.start {runs}/art {runs}/start --scale {scale}", "start/model_index.json"),
    Stage(
        "autoencoder",
        "sfumato train autoencoder -m {runs}/start -d {runs}/art -o {runs}/autoencoder --size 64x64 --crop --zoom 2 "
        "--flip --batch 16 --steps {cuts} --learning-rate 2e-3 --warmup 100 --kl 4e-6 --standardise 100 " + ADAM,
    ),
    Stage(
        "base",
        "sfumato train text-to-image -m {runs}/autoencoder/final -d {runs}/nouns -o {runs}/base --train unet "
        "--train text_encoder --rate text_encoder=2 --cached memory --batch {batch} --steps {steps} --learning-rate "
        f"{{rate}} --warmup 200 --ema 0.999 --dropout 0.1 {VELOCITY} {ADAM}",
    ),
    _net("lines", "--control canny --control scribble"),
    _net("regions", "--control regions"),
    _net("grayscale", "--control grayscale"),
)  # fmt: skip
