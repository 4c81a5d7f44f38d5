"""Self-Attention Guidance."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping

from jaxtyping import Array, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, Request, State, gate
from sfumato.controls.blur import blurred
from sfumato.controls.check import number, window
from sfumato.errors import SfumatoError
from sfumato.models.blocks import nearest
from sfumato.types import Prediction, Step, Window, pytree

MIDDLE = "mid_block.attentions.0.transformer_blocks.0.attn1"
"""The self-attention layer whose map is looked at: the first one of the middle block, also where there are several."""

THRESHOLD = 1.0
"""psi: how much attention, summed over all positions, makes a position attended to; 1 is the average."""

RADIUS, DEVIATION = 4, 1.0
"""The Gaussian of 9 x 9 that the authors and the reference blur latents with, in latent pixels."""


@pytree
class SAG(Control):
    """Self-Attention Guidance (arXiv:2210.00939, algorithm 1): the picture is blurred where the network looks, and the
    output is moved away from what the network makes of that: eps' = eps(x) + scale (eps(x) - eps(x^)) (eq. 16).

    `scale` is s of eq. 16; 0 is nothing, but only outside of `window` the evaluation of x^ is saved. It acts on the
    branch of the negative prompt where CFG or another control has one (eq. 25), otherwise on that of the prompt.

    diffusers 0.42 agrees for networks that predict noise and samplers that do not scale their latents (DDIM). With
    others it evaluates x^ unscaled. With v-prediction it subtracts velocities, and as x and x^ are different, that is
    not their difference in noise: it lacks sigma (x0 - x0^). Here eq. 16 holds for every sampler and network.
    """

    scale: Float[Array, ""] | float = 0.75
    window: Window = Window()

    taps = frozenset({MIDDLE})

    def prepare(self, request: Request) -> SAG:
        if MIDDLE not in request.model.unet.attention_paths():
            name = request.model.name or "The model"
            raise SfumatoError(f"SAG looks at the attention of the middle block, and {name} has none there.")
        return dc.replace(self, scale=number("SAG's scale", self.scale), window=window("SAG", self.window))

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents, State]:
        branch = UNCOND if UNCOND in preds else COND
        out, x = preds[branch].eps, xs[branch]

        def on() -> Latents:
            x0, eps = env.x0(out, x), env.eps(out, x)
            mask = attended(preds[branch].taps[MIDDLE], (x.shape[1], x.shape[2]))
            degraded = (1 - mask) * x0 + mask * blurred(x0, RADIUS, DEVIATION)
            noised = step.alpha * degraded + step.sigma * eps
            return self.scale * (env.output(degraded, eps) - env.evaluate({branch: noised})[branch].eps)

        return gate(self.window.active(step), on), state


def attended(probabilities: Float[Array, "B N K K"], size: tuple[int, int]) -> Float[Array, "B H W 1"]:
    """1 where the middle block's map attends to, otherwise 0, at latent `size` (height, width); algorithm 1, M_t."""
    attention = probabilities.mean(1).sum(1)
    rows, columns = size
    while rows * columns > attention.shape[1]:  # every level halves the size, rounding up
        rows, columns = -(-rows // 2), -(-columns // 2)
    mask = (attention > THRESHOLD).astype(probabilities.dtype)
    return nearest(mask.reshape(-1, rows, columns, 1), size)
