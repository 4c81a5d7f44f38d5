"""Perturbed-attention guidance."""

from __future__ import annotations

import dataclasses as dc
import re
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float

from sfumato.controls.base import COND, Control, Env, Latents, Request, State, gate
from sfumato.controls.check import number, window
from sfumato.errors import SfumatoError
from sfumato.model import Model
from sfumato.models.attention import identity
from sfumato.types import Prediction, Step, Window, pytree, static


@pytree
class PAG(Control):
    """Perturbed-attention guidance (arXiv:2403.17377, eq. 15-16): out = cond + scale (cond - perturbed), where the
    perturbed output comes from the network with the identity for the self-attention maps of some layers.

    `scale` is s of the paper; 0 is nothing, but only outside of `window` the further evaluation is saved. `layers` are
    parts of checkpoint paths, such as "up_blocks.1.attentions.0": every self-attention layer that has one of them in
    its path is perturbed. None is "mid", the middle block.

    diffusers 0.42 agrees, but for two things: its `layers` are regular expressions, where here they are plain text (in
    which a number at the end is a whole number), and its rescaling takes in the sum of CFG and PAG, where here
    `CFG(rescale=...)` takes in CFG alone.
    """

    scale: Float[Array, ""] | float = 3.0
    layers: str | Sequence[str] | None = static(default=None)
    window: Window = Window()

    def prepare(self, request: Request) -> PAG:
        scale, layers = number("PAG's scale", self.scale), chosen(request.model, self.layers)
        return dc.replace(self, scale=scale, layers=layers, window=window("PAG", self.window))

    def wants(self, name: str, steps: Step) -> Bool[np.ndarray, " R"]:
        return np.full(np.shape(steps.t), False)  # it has "cond" alone in mind, which is always there

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents, State]:
        def on() -> Latents:
            perturbed = env.evaluate({COND: xs[COND]}, dict.fromkeys(self.layers or (), identity))
            return self.scale * (preds[COND].eps - perturbed[COND].eps)

        return gate(self.window.active(step), on), state


def chosen(model: Model, parts: str | Sequence[str] | None) -> tuple[str, ...]:
    """The paths of the self-attention layers that `parts` choose, in the order of the network.

    Raises SfumatoError for a part that chooses none.
    """
    own = [path for path in model.unet.attention_paths() if path.endswith(".attn1")]
    given = ("mid",) if parts is None else (parts,) if isinstance(parts, str) else parts
    if not (isinstance(given, Sequence) and given and all(isinstance(part, str) and part for part in given)):
        raise SfumatoError(f"PAG's layers are parts of checkpoint paths, such as 'mid', not {parts!r}.")
    # No digit follows a digit: "up_blocks.1" is not "up_blocks.10".
    found = {part: [path for path in own if re.search(re.escape(part) + r"(?!(?<=\d)\d)", path)] for part in given}
    for part in given:
        if not found[part]:
            example = own[-1].split(".attentions")[0] if own else None
            hint = f"; {example!r}, for example, is there" if example else ""
            raise SfumatoError(f"{model.name or 'The model'} has no self-attention layer {part!r} for PAG{hint}.")
    return tuple(path for path in own if any(path in paths for paths in found.values()))
