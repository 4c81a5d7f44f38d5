"""Classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, Request, State
from sfumato.controls.check import number, window
from sfumato.types import Conditioning, Prediction, Step, Window, pytree


@pytree
class CFG(Control):
    """out = uncond + scale (cond - uncond) (arXiv:2207.12598, eq. 6 with scale = 1 + w).

    `scale` 1 is no guidance. `rescale` in [0, 1] is the share of the correction that gives the guided output the
    standard deviation of the conditional one, picture by picture (arXiv:2305.08891, eq. 14-16; 0.7 there). Outside of
    `window` there is no guidance (arXiv:2404.07724, eq. 5, in shares of the steps instead of noise levels). Where there
    is none, the unconditional half of the network's batch is left out.
    """

    scale: Float[Array, ""] | float = 7.5
    rescale: Float[Array, ""] | float = 0.0
    window: Window = Window()

    plain = True

    def prepare(self, request: Request) -> CFG:
        scale, rescale = number("The guidance scale", self.scale), number("CFG's rescale", self.rescale, 0, 1)
        return CFG(scale, rescale, window("CFG", self.window))

    def branches(self, base: Mapping[str, Conditioning]) -> dict[str, Conditioning]:
        return {UNCOND: base[UNCOND]}

    def wants(self, name: str, steps: Step) -> Bool[np.ndarray, " R"]:
        window = Window(float(self.window.start), float(self.window.stop))
        return np.asarray(window.active(steps)) & (name == UNCOND) & (float(self.scale) != 1)

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step, state: State
    ) -> tuple[Latents | float, State]:
        if UNCOND not in preds:  # asleep, for here is no guidance
            return 0.0, state
        cond, uncond = preds[COND].eps, preds[UNCOND].eps
        guided = cond + (self.scale - 1) * (cond - uncond)

        def deviation(out: Latents) -> Float[Array, "B 1 1 1"]:
            return out.std((1, 2, 3), keepdims=True)

        spread = deviation(guided)
        matched = guided * jnp.where(spread > 0, deviation(cond) / jnp.where(spread > 0, spread, 1), 1)
        difference = guided - cond + self.rescale * (matched - guided)
        return jnp.where(self.window.active(step), difference, 0), state
