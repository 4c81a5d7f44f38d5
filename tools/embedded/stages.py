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
        "cuts": "4500", "batch": "32", "steps": "6000", "rate": "1.3e-3",
        "pairs": "600", "more": "3000", "less": "1e-3", "nets": "16", "net": "6800", "other": "1000",
        "own": "1800",
    },
    "large": {
        "nouns": "", "styles": "", "scale": "large",
        "cuts": "20000", "batch": "128", "steps": "20000", "rate": "6e-4",
        "pairs": "6000", "more": "20000", "less": "4e-4", "nets": "128", "net": "6000", "other": "3000",
        "own": "3000",
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


def _base(name: str, start: str, art: str, how: str) -> Stage:
    """The UNet and the text encoder: first of things as they are, which says what words mean, then also of things in
    other colours and of two at once."""
    return Stage(
        name,
        f"sfumato train text-to-image -m {{runs}}/{start}/final -d {{runs}}/{art} -o {{runs}}/{name} --train unet "
        f"--train text_encoder --rate text_encoder=2 --cached memory --batch {{batch}} {how} --warmup 200 {VELOCITY} "
        f"{ADAM}",
    )


def _net(name: str, controls: str, how: str) -> Stage:
    """A ControlNet. It learns from all concepts, more than the base knows, so that it follows the control picture and
    does not take it for a name; and from things in other colours, so that it leaves those to the text."""
    return Stage(
        name,
        f"sfumato train controlnet -m {{runs}}/base/final -d {{runs}}/control-art -o {{runs}}/{name} {controls} "
        f"--cached memory {how} --batch {{nets}} --warmup 50 --ema 0.995 --dropout 0.2 {VELOCITY} {ADAM}",
    )


LINES = "--control canny --control scribble"
FIRST = "--hint-channels 8 --steps {net} --learning-rate 1e-3"
OTHER = "--net {runs}/outlines/final --steps {other} --learning-rate 8e-4"
"""From the net of the lines: how to steer, it knows already, and how to read another picture is soon learnt."""
OWN = "--learning-rate 1e-3 --consistent-own --steps {own}"
"""In the end a net learns to steer what it draws itself."""

STAGES = (
    Stage("art", "python -m tools.art {runs}/art --cache {runs}/packages", "art/metadata.jsonl"),
    Stage(
        "concepts", "python -m tools.art {runs}/concepts --cache {runs}/packages {styles}", "concepts/metadata.jsonl",
    ),
    Stage("nouns", "python -m tools.art {runs}/nouns --cache {runs}/packages {nouns} {styles}", "nouns/metadata.jsonl"),
    Stage(
        "blob-art", "python -m tools.art {runs}/blob-art --cache {runs}/packages {nouns} --styles noto-blob",
        "blob-art/metadata.jsonl",
    ),
    Stage("start", "python -m tools.embedded.start {runs}/art {runs}/start --scale {scale}", "start/model_index.json"),
    Stage(
        "autoencoder",
        "sfumato train autoencoder -m {runs}/start -d {runs}/art -o {runs}/autoencoder --size 64x64 --crop --zoom 2 "
        "--flip --batch 16 --steps {cuts} --learning-rate 2e-3 --warmup 100 --kl 4e-6 --standardise 100 " + ADAM,
    ),
    Stage(
        "control-art",
        "python -m tools.art.vary {runs}/nouns {runs}/control-art --pairs {pairs} --also {runs}/concepts",
        "control-art/metadata.jsonl",
    ),
    Stage("varied", "python -m tools.art.vary {runs}/nouns {runs}/varied --pairs {pairs}", "varied/metadata.jsonl"),
    _base("words", "autoencoder", "nouns", "--steps {steps} --learning-rate {rate} --ema 0.999 --dropout 0.1"),
    _base("base", "words", "varied", "--steps {more} --learning-rate {less} --ema 0.998 --dropout 0.15"),
    _net("outlines", LINES, FIRST),
    _net("lines", LINES, OWN + " --net {runs}/outlines/final --consistent-edges 6"),
    _net("areas", "--control regions", OTHER),
    _net("regions", "--control regions", OWN + " --net {runs}/areas/final --consistent-edges 3 --consistent-colours 6"),
    _net("grayscale", "--control grayscale", OTHER),
    Stage(
        "examples", "python -m tools.embedded.examples {runs}/art {runs}/examples", "examples/word/metadata.jsonl",
    ),
    Stage(
        "blob",
        "sfumato train lora -m {runs}/base/final -d {runs}/blob-art -o {runs}/blob --rank 8 --target all "
        f"--cached memory --batch 16 --steps 500 --learning-rate 2e-3 --warmup 30 {VELOCITY} {ADAM}",
    ),
    Stage(
        "blue-heart",
        "sfumato train textual-inversion -m {runs}/base/final -d {runs}/examples/word -o {runs}/blue-heart --token "
        f"'<blue-heart>' --start-from heart --vectors 4 --own-texts --batch 6 --steps 200 --learning-rate 2e-2 "
        f"{VELOCITY} {ADAM}",
    ),
    Stage(
        "painted-cat",
        "sfumato train dreambooth -m {runs}/base/final -d {runs}/examples/subject -o {runs}/painted-cat --prompt "
        "'a sks cat face' --class-prompt 'a cat face' --class-count 24 --class-guidance 3 --rank 2 --target all "
        f"--cached memory --batch 8 --steps 300 --learning-rate 1.5e-3 {VELOCITY} {ADAM}",
    ),
)  # fmt: skip
