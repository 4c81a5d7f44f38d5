"""ControlNet in the loop."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sfumato.controls.base import UNCOND, Control, Latents, Request, batched, gate
from sfumato.controls.check import number, pictures, window
from sfumato.errors import SfumatoError
from sfumato.model import check_fits
from sfumato.models.controlnet import ControlNet as Net
from sfumato.types import Conditioning, Keys, Residuals, Step, Window, pytree, static


@pytree
class ControlNet(Control):
    """The residuals of a ControlNet, times `scale`, are added to the UNet's skips (arXiv:2302.05543, section 3.2).

    `image` is the control picture, one for all or a list with one for each; `scale` 0 is without it. In `guess` mode
    (section 3.3 of the supplement, "guess mode" in the authors' code) the negative prompt's rows go without, and
    the residuals grow from a tenth at the first skip to all at the middle block. Outside `window` it costs nothing.
    """

    net: Net
    image: Any
    scale: Float[Array, ""] | float = 1.0
    window: Window = Window()
    guess: bool = static(default=False)
    heard: Any = None
    """What the net makes of the texts, by branch, once it is ready."""

    per_picture = frozenset({"image", "heard"})

    def prepare(self, request: Request) -> ControlNet:
        if not isinstance(self.net, Net):
            raise SfumatoError(f"ControlNet takes what load_controlnet returns, not a {type(self.net).__name__}.")
        check_fits(self.net, request.model)
        image = pictures("ControlNet", self.image, request.batch, request.size, signed=False)
        channels = self.net.config.conditioning_channels
        if channels not in (1, 3):
            raise SfumatoError(f"This ControlNet takes control pictures of {channels} channels, and pictures have 3.")
        return dc.replace(
            self, image=jax.device_put(image[..., :channels]), scale=number("ControlNet's scale", self.scale),
            window=window("ControlNet", self.window),
        )  # fmt: skip

    def ready(self, conds: Mapping[str, Conditioning]) -> dict[str, Any]:
        heard = {name: self.net.hear(conds[name].context) for name in self._names(conds)}
        return {"image": self.net.hint(self.image), "heard": heard}

    def condition(
        self, conds: dict[str, Conditioning], xs: Mapping[str, Latents], step: Step
    ) -> dict[str, Conditioning]:
        names = self._names(conds)
        if not names:
            return conds
        # The branches are evaluated together: what is heard is known of all of them or of none.
        known = self.heard is not None and all(conds[name].heard is not None for name in names)

        def run(x: Latents, cond: Conditioning, hint: Float[Array, "B _ _ D"]) -> Residuals:
            return self.net.residuals(x, step.t, cond, hint)

        def on() -> dict[str, Residuals]:
            plain = {name: plainly(conds[name], self.heard[name] if known else None) for name in names}
            found = batched(run, {name: xs[name] for name in names}, plain, dict.fromkeys(names, self.image))
            return jax.tree.map(lambda r: r.astype(jnp.promote_types(r.dtype, jnp.float32)), found)

        found = gate(self.window.active(step), on)
        # Rows that go without still need residuals to be batched with those that have some.
        none: Residuals = jax.tree.map(jnp.zeros_like, found[names[0]])
        return {
            name: dc.replace(cond, residuals=self._sum(cond, found.get(name) or none)) for name, cond in conds.items()
        }

    def _names(self, conds: Mapping[str, Conditioning]) -> list[str]:
        """The branches that it adds something to."""
        return [name for name in conds if not (self.guess and name == UNCOND)]

    def _sum(self, cond: Conditioning, own: Residuals) -> Residuals:
        layers = [*own.down, own.mid]
        if self.guess and not self.net.config.global_pool_conditions:
            scales = jnp.logspace(-1, 0, len(layers)) * self.scale
        else:
            scales = jnp.full(len(layers), self.scale)
        layers = [layer * scale for layer, scale in zip(layers, scales, strict=True)]
        if cond.residuals is not None:
            before = [*cond.residuals.down, cond.residuals.mid]
            layers = [layer + other for layer, other in zip(layers, before, strict=True)]
        return Residuals(tuple(layers[:-1]), layers[-1])


def plainly(cond: Conditioning, heard: dict[str, Keys] | None = None) -> Conditioning:
    """What a ControlNet sees of a conditioning: the texts, or what it has `heard` of them, and whether only its
    outermost part is needed."""
    reuse = cond.reuse and dc.replace(cond.reuse, kept=None)
    return dc.replace(cond, channels=None, residuals=None, merging=None, heard=heard, reuse=reuse)
