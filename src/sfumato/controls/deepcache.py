"""DeepCache: the deeper part of the UNet is computed only now and then."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sfumato.controls.base import Control, Env, Latents, Request, State
from sfumato.controls.check import whole, window
from sfumato.errors import SfumatoError
from sfumato.types import Conditioning, Deep, Prediction, Reuse, Step, Window, pytree, static


@pytree
class DeepCache(Control):
    """One row in `every` is computed in full; in the others, what comes from the deeper part of the UNet is that of the
    last full one (DeepCache, arXiv:2312.00858, section 3.2).

    `layers` is how much is computed in any case: the last layers of the last level on the way up, from 1 to all, and
    what they need on the way down. 2 is the authors' first skip branch. The more, the closer to the exact pictures and
    the slower. `every` 1 is without, and so are the rows outside of `window`. Rows are evaluations of the network that
    the sampler asks for; the first of a run is a full one. ControlNets leave out the same part. Attention maps of it
    that another control looks at (SAG) are those of the last full row.

    What other controls evaluate on their own (SAG, PAG, Attend-and-Excite, Pix2Pix-Zero) is always exact. It costs what
    it costs without, and where such a result is set against that of the row (SAG, PAG), the error is scaled, too.
    """

    every: Int[Array, ""] | int = 3
    layers: int = static(default=2)
    window: Window = Window()

    excludes: ClassVar[Mapping[str, str]] = {"DeepCache": "one says how often everything is computed"}

    def prepare(self, request: Request) -> DeepCache:
        most, layers = len(request.model.unet.up_blocks[-1].resnets), whole("DeepCache's layers", self.layers, 1)
        if layers > most:
            name = request.model.name or "The model"
            raise SfumatoError(f"DeepCache's layers must be at most {most}, for {name} has no more, not {layers}.")
        every = jnp.asarray(whole("DeepCache's every", self.every, 1))
        return DeepCache(every, int(layers), window("DeepCache", self.window))

    def init(self, x: Latents, memory: State) -> None:
        """In the loop: for how many rows what was kept will do, and what was kept for each branch."""

    def recall(
        self, conds: dict[str, Conditioning], step: Step, state: tuple[Int[Array, ""], dict[str, Deep]] | None
    ) -> dict[str, Conditioning]:
        full, kept = self._full(step, state), {} if state is None else state[1]
        return {name: dc.replace(cond, reuse=Reuse(full, kept.get(name), self.layers)) for name, cond in conds.items()}

    def guide(
        self, env: Env, preds: Mapping[str, Prediction], xs: Mapping[str, Latents], step: Step,
        state: tuple[Int[Array, ""], dict[str, Deep]] | None,
    ) -> tuple[float, State]:  # fmt: skip
        left = jnp.zeros_like(self.every) if state is None else state[0]
        left = jnp.where(self._full(step, state), self.every, left) - 1
        return 0.0, (left, {name: pred.kept for name, pred in preds.items()})

    def _full(self, step: Step, state: tuple[Int[Array, ""], dict[str, Deep]] | None) -> Bool[Array, ""]:
        """Whether this row is computed in full."""
        return jnp.array(True) if state is None else (state[0] == 0) | ~self.window.active(step)
