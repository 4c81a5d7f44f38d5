"""`invert`: from pictures to the latents that DDIM would make them of."""

from __future__ import annotations

import dataclasses as dc
from collections.abc import Sequence
from typing import Any

from jaxtyping import Array, Float32

from sfumato import run
from sfumato.cache import enable_cache
from sfumato.controls import Control
from sfumato.controls.check import pictures
from sfumato.errors import SfumatoError
from sfumato.generate import Progress, check_choices, check_model, checked_controls, prepare_job
from sfumato.model import Model
from sfumato.plan import make_plan
from sfumato.samplers import DDIMInverse, RegularisedInverse
from sfumato.samplers.base import Sampler


def invert(
    model: Model, image: Any, prompt: str | Sequence[str] = "", *, negative: str | Sequence[str] | None = None,
    controls: Sequence[Control] = (), steps: int = 50, size: tuple[int, int] | None = None,
    regularise: bool | RegularisedInverse = False, weights: bool = True, clip_skip: int = 0, tiled: bool | None = None,
    batch: int | None = None, devices: Sequence[Any] | None = None, progress: Progress | None = None,
) -> tuple[Float32[Array, "B h w C"], list[str]]:  # fmt: skip
    """DDIM inversion (arXiv:2010.02502, section 4.3): the latents that DDIM turns into given pictures.

    `image` is one picture or a list, and `prompt` describes it: one text for all, or a list with one for each.
    `generate(model, captions, latents=latents, sampler="ddim", steps=steps, controls=())` gives the pictures back, the
    better the more steps there are. Guidance, on either way, makes that worse; here there is none unless `controls`
    says so (only then `negative` counts). `size` is (width, height) in pixels, None for the model's own.

    `regularise` keeps the noise on the way close to white Gaussian noise, so that the latents are easier to edit and
    give the picture back a little less exactly: True for the numbers of Pix2Pix-Zero, or a
    `sfumato.samplers.RegularisedInverse` with others. All other arguments are as in `generate`.

    Returns (latents [B, h, w, C], captions): what `generate` starts from, and the prompt of each. Raises SfumatoError
    for what does not fit, before anything is compiled, and Cancelled.
    """
    enable_cache()
    check_model("invert", model)
    many = len(image) if isinstance(image, list | tuple) else 1
    plan = make_plan(model, [prompt] * max(many, 1) if isinstance(prompt, str) else prompt, negative, 1, 0, size)
    sampler = _sampler(regularise, plan.latent_shape)
    controls = checked_controls(controls, model)
    check_choices("latents", batch, devices)
    table = run.rows(model, sampler, steps)
    pixels = pictures("image", image, len(plan), plan.size, signed=True)
    job = prepare_job(
        model, plan, sampler, table, controls, None, weights=weights, clip_skip=clip_skip, tiled=tiled,
        devices=devices, progress=progress,
    )  # fmt: skip
    clean = run.encode_image(model.vae, pixels, job.tiled)
    return dc.replace(job, latents=clean, handed_over=True).rounds(batch, "latents"), list(plan.prompts)


def _sampler(regularise: Any, shape: tuple[int, int, int]) -> Sampler:
    """The sampler for latents of this shape. Raises SfumatoError for what is neither yes nor no nor a sampler."""
    if isinstance(regularise, RegularisedInverse):
        return dc.replace(regularise, shape=shape)
    if not isinstance(regularise, bool):
        raise SfumatoError(f"regularise is True, False or a RegularisedInverse, not {regularise!r}.")
    return RegularisedInverse(shape=shape) if regularise else DDIMInverse()
