"""Pix2Pix-Zero: an edit that keeps the layout of the picture, arXiv:2302.03027."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, Request, State, gate
from sfumato.controls.check import number, window
from sfumato.errors import SfumatoError
from sfumato.types import Conditioning, Step, Window, pytree, static

SOURCE = "source"
"""The branch of the run that is followed: the prompt without the edit."""

AT_ONCE = 16
"""Sentences that are encoded together."""


@dc.dataclass(frozen=True)
class Pix2PixZero(Control):
    """Turns what the `source` sentences have in common into what the `target` sentences have in common.

    The run's prompt describes the picture before the edit, and its latents are seeded ones or those that
    `sfumato.invert` found for a real picture. The direction mean(targets) - mean(sources) of the text features is added
    to those of the prompt (arXiv:2302.03027, section 3.2), of the token features alone: SDXL's pooled ones stay.

    Beside the run goes another one from the same latents, without the direction and with no other controls than CFG
    and those that show the network something (ControlNet). In every row x moves by -`amount` dL/dx, where L is the
    squared distance between the cross-attention maps of the two (section 3.3), summed over layers, pixels and tokens,
    averaged over heads and over the branches "cond" and "uncond". 0 is without, 0.1 is the authors' strength; a model
    that predicts v takes a tenth of that.

    Outside of `window` the direction stays, and the maps are free. After it the other run stops, and costs nothing.

    As in the authors' code both branches move, each along its own gradient, and the sampler goes on from the latents
    of "uncond". Branches of other controls move as that one does, so that differences between branches remain
    differences of texts. The torch pipeline makes the two runs one after the other and stores the maps of all steps;
    here they take their steps together, and the maps of one step are all there ever is. It also takes one picture
    only, and without guidance it leaves out the direction: here every picture has a mean of its own, and the direction
    is always added.
    """

    source: str | Sequence[str]
    target: str | Sequence[str]
    amount: Float[Array, ""] | float = 0.1
    window: Window = dc.field(default_factory=Window)

    excludes: ClassVar = {"InstructPix2Pix": "the prompt describes the picture for the one, and the edit for the other"}

    def texts(self) -> Sequence[str]:
        return [*_sentences("source", self.source), *_sentences("target", self.target)]

    def prepare(self, request: Request) -> Following:
        amount = number("Pix2PixZero's amount", self.amount, 0)
        when = window("Pix2PixZero", self.window)
        layers = tuple(path for path in request.model.unet.attention_paths() if path.endswith(".attn2"))
        if not layers:
            raise SfumatoError("Pix2PixZero follows attention to the text, and this network has no such layer.")
        source, target = _sentences("source", self.source), _sentences("target", self.target)
        return Following(_mean(request, target) - _mean(request, source), amount, when, layers)


@pytree
class Following(Control):
    """A prepared `Pix2PixZero`. It carries the latents of the run that is followed, and its sampler's memory."""

    direction: Float[Array, "L D"]
    amount: Float[Array, ""]
    window: Window
    layers: tuple[str, ...] = static()
    """The cross-attention layers, by checkpoint path."""

    def init(self, x: Latents, memory: State) -> State:
        return x, memory

    def branches(self, base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        edited = dc.replace(base[COND], context=base[COND].context + self.direction)
        return {SOURCE: base[COND], COND: edited}

    def steer(self, env: Env, xs: dict[str, Latents], step: Step, state: State) -> tuple[dict[str, Latents], State]:
        # The branches that move, and those of the other run whose maps they shall keep.
        pairs = {COND: SOURCE, UNCOND: UNCOND} if UNCOND in xs else {COND: SOURCE}

        def row() -> tuple[dict[str, Latents], State]:
            other, memory = state
            found = env.evaluate(dict.fromkeys(pairs.values(), other), self.layers)
            preds = {name: found[kept] for name, kept in pairs.items()}

            def distance(moved: dict[str, Latents]) -> Float[Array, ""]:
                maps = {name: pred.taps for name, pred in env.evaluate(moved, self.layers).items()}
                squares = [
                    ((maps[name][layer] - preds[name].taps[layer]) ** 2).sum((2, 3)).mean(1)
                    for name in pairs for layer in self.layers
                ]  # fmt: skip
                return jnp.stack(squares).sum() / len(pairs)

            moved = {name: xs[name] for name in pairs}
            slopes = gate(self.window.active(step), lambda: jax.grad(distance)(moved))
            return slopes, env.advance(other, env.guided(preds, {COND: other, UNCOND: other}), memory)

        ahead = (step.progress < self.window.stop) & (self.window.start < self.window.stop) & (self.amount > 0)
        still = {name: jnp.zeros_like(xs[name]) for name in pairs}
        slopes, state = jax.lax.cond(ahead, row, lambda: (still, state))
        first = UNCOND if UNCOND in xs else COND
        steered = {name: x - self.amount * slopes.get(name, slopes[first]) for name, x in xs.items() if name != SOURCE}
        return steered, state


def _mean(request: Request, sentences: Sequence[str]) -> Float[Array, "L D"]:
    """The mean of the token features of sentences."""
    parts = [sentences[first : first + AT_ONCE] for first in range(0, len(sentences), AT_ONCE)]
    return jnp.stack([request.encode_text(part).context.sum(0) for part in parts]).sum(0) / len(sentences)


def _sentences(what: str, value: Any) -> list[str]:
    """The sentences. Raises SfumatoError for what is no text or list of texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(text, str) for text in texts):
        raise SfumatoError(
            f"Pix2PixZero's {what} must be a sentence or a list of them, with at least one, not {value!r}."
        )
    return list(texts)
