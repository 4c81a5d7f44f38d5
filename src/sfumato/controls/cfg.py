"""Classifier-free guidance."""

from __future__ import annotations

import dataclasses as dc
import warnings
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sfumato.controls.base import COND, UNCOND, Control, Env, Latents, Request, State
from sfumato.controls.check import number, window
from sfumato.errors import SfumatoError
from sfumato.model import Model
from sfumato.models.embeddings import sinusoidal
from sfumato.types import Conditioning, Prediction, Step, Window, pytree, static


@pytree
class CFG(Control):
    """out = uncond + scale (cond - uncond) (arXiv:2207.12598, eq. 6 with scale = 1 + w).

    `scale` 1 is no guidance. `rescale` in [0, 1] is the share of the correction that gives the guided output the
    standard deviation of the conditional one, picture by picture (arXiv:2305.08891, eq. 14-16; 0.7 there). Outside of
    `window` there is no guidance (arXiv:2404.07724, eq. 5, in shares of the steps instead of noise levels). Where there
    is none, the unconditional half of the network's batch is left out.

    A model whose guidance was distilled into it (`time_cond_proj_dim`, latent consistency models) is told the scale
    instead, outside of `window` a scale of 1, and makes no use of a negative prompt.
    """

    scale: Float[Array, ""] | float = 7.5
    rescale: Float[Array, ""] | float = 0.0
    window: Window = Window()

    plain = True

    @classmethod
    def of(cls, model: Model, scale: float | None = None, rescale: float = 0.0) -> CFG:
        """The guidance that a model draws best with, in its window; with a `scale` of one's own, in the same window."""
        return cls(model.guidance if scale is None else scale, rescale, model.guided)

    def prepare(self, request: Request) -> Control:
        scale, rescale = number("The guidance scale", self.scale), number("CFG's rescale", self.rescale, 0, 1)
        ends, width = window("CFG", self.window), request.model.unet.config.time_cond_proj_dim
        if width is None:
            return CFG(scale, rescale, ends)
        if float(self.rescale):
            name = request.model.name or "This model"
            raise SfumatoError(f"{name} is told its guidance scale and predicts once, so CFG's rescale has nothing to "
                               "do; leave it at 0.")  # fmt: skip
        if any(request.negatives):
            warnings.warn("The negative prompt has no effect: this model is told its guidance scale.", stacklevel=2)
        return Told(scale, ends, width)

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


@pytree
class Told(Control):
    """The guidance scale as an input of a distilled network (arXiv:2310.04378, section 4.2): 1000 (scale - 1) in the
    same waves as times. diffusers' `get_guidance_scale_embedding`."""

    scale: Float[Array, ""]
    window: Window
    width: int = static()

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:  # fmt: skip
        w = jnp.where(self.window.active(step), self.scale - 1, 0)
        waves = sinusoidal(1000 * w[None], self.width, flip_sin_to_cos=False, freq_shift=1)
        return {name: dc.replace(cond, guidance=jnp.tile(waves, (len(xs[name]), 1))) for name, cond in conds.items()}
