"""Semantic guidance (SEGA)."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sfumato.controls.base import UNCOND, Control, Env, Latents, Request, State
from sfumato.controls.check import finite, number
from sfumato.errors import SfumatoError
from sfumato.types import Conditioning, Prediction, Step, pytree


@dc.dataclass(frozen=True)
class Edit:
    """Something that `SEGA` adds to a picture or takes out of it."""

    text: str | Sequence[str]
    """What it is: one text for all pictures, or a list with one for each. Read like a prompt."""
    scale: float = 5.0
    """How strongly; 0 is not at all."""
    threshold: float = 0.9
    """The share of the latents that it leaves alone, in [0, 1]: high for details, low for the style of it all."""
    warmup: float = 10
    """It begins after so many steps, counted from where the run begins; the more, the less of the scene changes."""
    cooldown: float | None = None
    """It ends after so many steps; None is never."""
    weight: float = 1.0
    """Its part in the sum of all edits, from 0 on."""
    remove: bool = False
    """Whether it is taken out."""


@dc.dataclass(frozen=True)
class SEGA(Control):
    """Steers along what sets an edit apart from the negative prompt, where that is largest (arXiv:2301.12247).

    With u the output for the negative prompt and e that for the edit's text, gamma is added to the guided output:

        psi_i   = e_i - u, or u - e_i to remove something                                          (eq. 6)
        gamma_i = scale_i psi_i where |psi_i| reaches its quantile `threshold_i`, 0 elsewhere      (eqs. 5, 7)
        gamma   = sum_i weight_i gamma_i + momentum_scale nu                                       (eqs. 4, 8)
        nu      = momentum_beta nu + (1 - momentum_beta) gamma, in the next step                   (eq. 9)

    An edit that still warms up has weight 0 in what is added. Momentum gathers all edits from the first step on, as if
    they had begun, and is added once the last of them has (section 3 of the paper).

    The authors' code, which diffusers' SemanticStableDiffusionPipeline is, departs from the paper. As it does, the
    quantile is that of each channel, where the paper's is of the whole estimate (people's thresholds are made for it),
    and an edit can end, when only what it has left in the momentum lasts a little. Otherwise than there:

    - While only some edits have begun, it divides their weights by their sum, so that an edit changes its strength when
      another one begins, and is NaN if all of those have ended. Here each keeps its own, as in the paper.
    - It has no effect without classifier-free guidance. Here it needs none: u is evaluated in any case.
    - It takes a negative weight as 0. Here that is refused.
    - An edit of scale or weight 0 is absent here: the momentum of others does not wait for it.

    `momentum_scale` and `momentum_beta` lie in [0, 1]. An edit costs one more row of the network's batch in every step.
    """

    edits: Sequence[Edit]
    momentum_scale: float = 0.1
    momentum_beta: float = 0.4

    excludes: ClassVar[Mapping[str, str]] = {"SEGA": "one SEGA takes all the edits"}

    def texts(self) -> Sequence[str]:
        return [text for edit, name in self._named() for text in _texts(edit, name)]

    def prepare(self, request: Request) -> Control:
        named = self._named()
        # As many texts as there are prompts, so that they are read by the program that reads those.
        conds = [request.encode_text(_spread(_texts(edit, name), name, request.batch)) for edit, name in named]
        strengths, thresholds, warmups, cooldowns = np.array([_numbers(*each) for each in named], np.float32).T
        return Directions(
            tuple(conds), jnp.asarray(strengths), jnp.asarray(thresholds), jnp.asarray(warmups), jnp.asarray(cooldowns),
            number("SEGA's momentum_scale", self.momentum_scale, 0, 1),
            number("SEGA's momentum_beta", self.momentum_beta, 0, 1),
        )  # fmt: skip

    def _named(self) -> list[tuple[Edit, str]]:
        """The edits, and what each is called in sentences."""
        if not isinstance(self.edits, list | tuple):
            raise SfumatoError(f"SEGA takes a list of edits, such as [Edit('smiling')], not a {_kind(self.edits)}.")
        if not self.edits:
            raise SfumatoError("SEGA has no edits; give it some, such as [Edit('smiling')].")
        for edit in self.edits:
            if not isinstance(edit, Edit):
                raise SfumatoError(f"SEGA's edits hold a {_kind(edit)}, which is no edit; see sfumato.Edit.")
        return [(edit, f"SEGA's edit {i}") for i, edit in enumerate(self.edits, start=1)]


@pytree
class Directions(Control):
    """What `SEGA` is in the loop."""

    conds: tuple[Conditioning, ...]
    """What the network sees of each edit."""
    strength: Float[Array, " edits"]
    """Scale times weight, negative to remove."""
    threshold: Float[Array, " edits"]
    warmup: Float[Array, " edits"]
    cooldown: Float[Array, " edits"]
    """Infinite for edits that do not end."""
    momentum_scale: Float[Array, ""]
    momentum_beta: Float[Array, ""]

    per_picture = frozenset({"conds"})

    def init(self, x: Latents, memory: State) -> tuple[Int[Array, ""], Latents]:
        return jnp.zeros((), jnp.int32), jnp.zeros_like(x)

    def branches(self, base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        return {UNCOND: base[UNCOND], **dict(zip(self._names(), self.conds, strict=True))}

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents, State]:
        count, momentum = state
        psi = jnp.stack([preds[name].eps - preds[UNCOND].eps for name in self._names()])
        largest = jax.vmap(_largest)(psi, self.threshold)
        strength = jnp.where(count < self.cooldown, self.strength, 0)
        begun = count >= self.warmup
        gathered = _sum(strength, largest) + self.momentum_scale * momentum
        all_begun = jnp.all(begun | (self.strength == 0))
        gamma = jnp.where(all_begun, gathered, _sum(jnp.where(begun, strength, 0), largest))
        momentum = self.momentum_beta * momentum + (1 - self.momentum_beta) * gathered
        return gamma, (count + 1, momentum)

    def _names(self) -> list[str]:
        return [f"edit {i}" for i in range(1, len(self.conds) + 1)]


def _largest(psi: Latents, threshold: Float[Array, ""]) -> Latents:
    """psi where its size reaches the quantile `threshold` of the channel, picture by picture, and 0 elsewhere."""
    size = jnp.abs(psi)
    return jnp.where(size >= jnp.quantile(size, threshold, axis=(1, 2), keepdims=True), psi, 0)


def _sum(strength: Float[Array, " edits"], parts: Float[Array, "edits B H W C"]) -> Latents:
    """Not a product of matrices, which accelerators round."""
    return (strength[:, None, None, None, None] * parts).sum(0)


def _texts(edit: Edit, name: str) -> list[str]:
    """The texts of an edit."""
    texts = [edit.text] if isinstance(edit.text, str) else edit.text
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise SfumatoError(f"The text of {name} must be a text or a list of texts, not {edit.text!r}.")
    if not texts or not all(text.strip() for text in texts):
        raise SfumatoError(f"{name} has no text; say what to add or to remove, such as Edit('smiling').")
    return list(texts)


def _spread(texts: list[str], name: str, pictures: int) -> list[str]:
    """One text for each picture."""
    if len(texts) not in (1, pictures):
        raise SfumatoError(f"{name} has {len(texts)} texts for {pictures} pictures; give one, or {pictures}.")
    return texts if len(texts) == pictures else texts * pictures


def _numbers(edit: Edit, name: str) -> tuple[float, float, float, float]:
    """Strength, threshold, and the steps after which the edit begins and ends."""
    if edit.scale is None:
        raise SfumatoError(f"{name} has no strength; give it a scale, such as Edit('smiling', scale=5).")
    if not isinstance(edit.remove, bool):
        raise SfumatoError(f"The remove of {name} must be True or False, not {edit.remove!r}.")
    strength = finite(f"The scale of {name}", edit.scale) * finite(f"The weight of {name}", edit.weight, 0)
    warmup = finite(f"The warmup of {name}", edit.warmup, 0)
    cooldown = np.inf if edit.cooldown is None else finite(f"The cooldown of {name}", edit.cooldown, 0)
    if cooldown <= warmup:
        raise SfumatoError(f"{name} would end after {cooldown:g} steps and begin only after {warmup:g}.")
    threshold = finite(f"The threshold of {name}", edit.threshold, 0, 1)
    return -strength if edit.remove else strength, threshold, warmup, cooldown


def _kind(value: Any) -> str:
    return type(value).__name__
